"""From a compiled prompt to what attention wants. ``hf.py`` is the one place that touches transformers' registries."""

from leattn.attention.eager import Eager
from leattn.attention.flex import Flex
from leattn.attention.kinds import Backend
from leattn.attention.sdpa import Sdpa
from leattn.attention.sparse import Sparse

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Eager(), Sdpa(), Flex(), Sparse())}
