"""From GGUF to a folder of transformers, once: the folder is kept beside the verdicts."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from leattn.attention.verdicts import folder
from leattn.errors import LeattnError
from leattn.loading.packages import PACKAGED, Packaged, write_gguf
from leattn.tiny.load import quiet


@contextmanager
def converted(name: str) -> Iterator[Path]:
    """A folder for ``from_pretrained`` with the packaged model, for as long as the block lasts where nothing is kept."""
    home, model = folder(), PACKAGED[name]
    if home is None:
        with TemporaryDirectory(prefix="leattn-") as staging:
            yield convert(model, Path(staging))
        return
    kept = home / "models" / f"{name}-{model.sha256[:12]}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Whatever ends this early, the folder under its final name is whole or not there.
        with TemporaryDirectory(dir=kept.parent, prefix=".") as staging:
            made = convert(model, Path(staging))
            try:
                made.rename(kept)
            except OSError:
                if not kept.is_dir():  # else another process was faster
                    raise
    yield kept


def convert(model: Packaged, staging: Path) -> Path:
    """Get the model's GGUF file and write it as float32, with its tokenizer, to a folder in `staging`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise LeattnError(f"{model.source} holds its model as GGUF, and reading that takes a package: pip install gguf")
    path, made = staging / "model.gguf", staging / "model"
    write_gguf(model, path)
    with quiet(), tqdm(desc="Turning it into float32, once", total=3, unit="step") as bar:
        weights: Any = AutoModelForCausalLM.from_pretrained(staging, gguf_file=path.name, dtype=torch.float32)
        bar.update()
        tokenizer: Any = AutoTokenizer.from_pretrained(staging, gguf_file=path.name)
        bar.update()
        # They are float32 now; newer releases of transformers note that they were GGUF, and then refuse to load what is saved.
        vars(weights.config).pop("quantization_config", None)
        weights.hf_quantizer = None
        weights.save_pretrained(made)
        tokenizer.save_pretrained(made)
        bar.update()
    return made
