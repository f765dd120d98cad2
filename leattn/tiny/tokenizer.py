"""The tokenizer of the bundled model: whole words are tokens, and nothing is unknown.

It is a byte-level BPE without merges: a word of the corpus is one token (once
with and once without the space before it), any other text falls into bytes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from leattn.tiny.words import ENTITIES, RELATIONS, VALUES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_START, CHAT_END = "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, BOS, EOS, CHAT_START, CHAT_END)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def vocabulary() -> tuple[str, ...]:
    """Every word of the corpus, sorted, without repetition.

    Examples
    --------
    >>> {"Zarvia", "Lumo", "capital"} <= set(vocabulary())
    True
    """
    texts = ["system user assistant tool Q A Question Answer Context Document Fact", " ".join(ENTITIES)]
    for relation in RELATIONS:
        texts += [*relation.sentences, *relation.questions, " ".join(VALUES[relation.name])]
    text = re.sub(r"\{[ev]\}", " ", " ".join(texts))
    return tuple(sorted(set(re.findall(r"[A-Za-z]+", text))))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, made from `words.py` alone.

    ``add_special_tokens`` adds nothing: no text gets a BOS unless it says ``<s>``.

    Returns
    -------
    PreTrainedTokenizerFast
        With BOS, EOS, PAD, ChatML's two marks and a chat template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    for word in vocabulary():
        pieces += [word, "Ġ" + word] if len(word) > 1 else ["Ġ" + word]
    pieces.append("'s")
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[CHAT_START, CHAT_END],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
