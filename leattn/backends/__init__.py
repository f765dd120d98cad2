"""From a compiled prompt to what attention wants. ``hf.py`` is the one place that touches transformers' registries."""

from leattn.backends.eager import Eager
from leattn.backends.flex import Flex
from leattn.backends.kinds import Backend
from leattn.backends.sdpa import Sdpa
from leattn.backends.sparse import Sparse

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Eager(), Sdpa(), Flex(), Sparse())}
