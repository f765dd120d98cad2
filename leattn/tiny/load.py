"""Loading the model that comes along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from leattn.errors import LeattnError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WEIGHTS = Path(__file__).parent / "weights"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers: what is on this disk is there at once."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load(path: str | Path = WEIGHTS) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The bundled model and its tokenizer, without any network.

    A Llama of less than a million weights that answers questions about facts stated in
    the prompt, and nothing else. It is for learning the library and for tests: outside
    of the sentences of `leattn.tiny.words` it does not know what it says, and where the
    answer is not in sight it guesses instead of admitting it.

    It expects questions as ``"\\nQ: …\\nA:"`` (or the chat template) and sentences that name the
    entity before the value. A question that sees nothing, as in the paraphrase patterns "anchor" and
    "isolated", it finds with ``positions="sequential"`` only.

    Parameters
    ----------
    path
        Another folder that ``python -m bundled_model --out`` has written, in a checkout of leattn.

    Returns
    -------
    model : LlamaForCausalLM
        float32, on the CPU, in eval mode.
    tokenizer : PreTrainedTokenizerFast
        Names and words of the corpus are single tokens, anything else is bytes; it adds
        no special tokens of its own.

    Raises
    ------
    LeattnError
        No weights at `path`.

    Examples
    --------
    >>> import leattn
    >>> from leattn import ICLNode
    >>> model, tokenizer = leattn.tiny.load()
    >>> bos = leattn.bos(tokenizer)
    >>> texts = ["\\nThe capital of Zarvia is Lumo.", "\\nThe capital of Genia is Madan."]
    >>> docs = [ICLNode(text, parents=[bos]) for text in texts]
    >>> q = ICLNode("\\nQ: What is the capital of Zarvia?\\nA:", parents=[bos, *docs])
    >>> prompt = leattn.compile_prompt(q, tokenizer)
    >>> logits = model(**leattn.model_inputs(model, prompt)).logits  # [1, S, vocabulary]
    >>> tokenizer.decode(logits[0, -1].argmax())
    ' Lumo'
    """
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    path = Path(path)
    if not (path / "model.safetensors").is_file():
        raise LeattnError(
            f"no weights in {path}; reinstall leattn, or run `python -m bundled_model --out {path}` in a checkout of it"
        )
    with quiet():
        model = LlamaForCausalLM.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    model.train(False)
    return model, tokenizer
