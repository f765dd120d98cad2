"""``special_tokens="text"``: the ids of the same tokenizer without its control tokens, built with `tokenizers` alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from leattn import ICLNode, compile_prompt
from leattn.errors import CompileError

LETTERS = "abcdefghijklmnopqrstuvwxyz<>|_/[]ABC.,"
MERGES = [("▁", "a"), ("<", "t"), ("t", "o"), ("▁", "t"), ("a", ">"), ("▁", "▁"), ("l", ">"), ("Ġ", "a"), ("Ġ", "<")]


def bpe(alphabet, **options):
    vocab = ["<unk>", *alphabet]
    merges = [pair for pair in MERGES if set(pair) <= set(alphabet) | {"to"}]
    vocab += ["".join(pair) for pair in merges]
    return models.BPE({piece: i for i, piece in enumerate(vocab)}, merges, unk_token="<unk>", **options)


def metaspace(scheme, split=True, model=None):
    tokenizer = Tokenizer(model or bpe(["▁", *LETTERS], fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def prepend():
    tokenizer = Tokenizer(bpe(["▁", *LETTERS]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def byte_level(prefix):
    tokenizer = Tokenizer(bpe(sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return tokenizer


def unigram():
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁a", -2.5), ("to", -2.5), *((letter, -3.0) for letter in LETTERS)]
    return metaspace("always", model=models.Unigram(pieces, 0, False))


def lower_case():
    tokenizer = metaspace("first")
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def word_piece():
    pieces = ["[UNK]", *LETTERS, *("##" + letter for letter in LETTERS), "to", "##ol"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


KINDS = {
    "metaspace first": lambda: metaspace("first"),
    "metaspace first, not split": lambda: metaspace("first", split=False),
    "metaspace always": lambda: metaspace("always"),
    "metaspace always, not split": lambda: metaspace("always", split=False),
    "metaspace never": lambda: metaspace("never"),
    "prepend": prepend,
    "byte level with a space": lambda: byte_level(True),
    "byte level": lambda: byte_level(False),
    "unigram": unigram,
    "lower case": lower_case,
    "word piece": word_piece,
}
ADDED = (
    AddedToken("<tool_call>", special=False),
    AddedToken("<tool_call>", special=False, normalized=False),
    AddedToken("<|eot|>", special=True),
    AddedToken("<|eot|>", special=True, normalized=True),
    AddedToken("[A>", special=False, single_word=True),
    AddedToken("</a>", special=False, lstrip=True),
    AddedToken("<to>", special=False, rstrip=True, normalized=False),
    AddedToken("<|a|>", special=False, lstrip=True, rstrip=True, normalized=True),
    AddedToken("_call", special=False),
)
PIECES = ("<tool_call>", "<|eot|>", "[A>", "</a>", "<to>", "<|a|>", "_call", "<|a", "tool", "<to", "ol_", "é", "🙂", "  ", "\n")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    added=st.lists(st.sampled_from(ADDED), min_size=1, max_size=5, unique_by=lambda token: token.content),
    texts=st.lists(st.lists(st.sampled_from(PIECES) | st.text(" abto<>", max_size=4), max_size=6), min_size=1, max_size=3),
)
def test_text_has_the_ids_of_the_tokenizer_without_control_tokens(kind, added, texts):
    without, backend = KINDS[kind](), KINDS[kind]()
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    joined = [text for pieces in texts if without.encode(text := "".join(pieces), add_special_tokens=False).ids]
    nodes = [ICLNode(text, special_tokens="text", id=f"n{i}") for i, text in enumerate(joined)]
    for node, text in zip(nodes, joined, strict=True):
        assert node.tokenize(tokenizer).tolist() == without.encode(text, add_special_tokens=False).ids, text
    if nodes:
        prompt = compile_prompt(nodes, tokenizer)
        assert [prompt[node].input_ids.tolist() for node in nodes] == [node.tokenize(tokenizer).tolist() for node in nodes]
    # The tokenizer itself is left as it was.
    assert tokenizer("a<tool_call>", add_special_tokens=False)["input_ids"] == backend.encode("a<tool_call>").ids


@pytest.mark.parametrize("kind", KINDS)
def test_whitespace_and_words_that_were_added_stay_what_they_are(kind):
    """Gemma's newlines and SentencePiece's runs of spaces are added tokens that steer nothing; their ids stay the same, too."""
    harmless = [AddedToken("\n\n", normalized=False), AddedToken("▁▁▁", normalized=False), AddedToken("Lumo", single_word=True)]
    with_harmless, backend = KINDS[kind](), KINDS[kind]()
    with_harmless.add_tokens([AddedToken(f"☃{i}") for i in "01"] + harmless)  # so that ids agree
    backend.add_tokens([AddedToken("<tool_call>"), AddedToken("<|a|>"), *harmless])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for text in ("a\n\nb<tool_call> Lumo <|a|>", "▁▁▁a Lumo", "aLumo \n\n\n"):
        found = ICLNode(text, special_tokens="text").tokenize(tokenizer).tolist()
        assert found == with_harmless.encode(text, add_special_tokens=False).ids


def test_unknown_characters_are_no_control_tokens():
    for kind in ("metaspace first", "unigram", "word piece", "prepend"):
        backend = KINDS[kind]()
        backend.add_special_tokens(["[UNK]" if kind == "word piece" else "<unk>"])
        for unk in ({}, {"unk_token": "[UNK]" if kind == "word piece" else "<unk>"}):
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **unk)
            text = "a <unk> 🙂 [UNK] b"
            expected = KINDS[kind]().encode(text, add_special_tokens=False).ids
            assert ICLNode(text, special_tokens="text").tokenize(tokenizer).tolist() == expected


def test_a_control_token_that_the_vocabulary_itself_makes_is_refused():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    backend = metaspace("always", model=models.Unigram(pieces, 0, False))
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(CompileError, match=r"text of node 'doc' holds '</s>', also a piece .*; take it out of the text"):
        ICLNode("a</s>b", id="doc", special_tokens="text").tokenize(tokenizer)
    assert ICLNode("a/s>b", special_tokens="text").tokenize(tokenizer).tolist() == backend.encode("a/s>b").ids


def test_a_tokenizer_written_in_python():
    class Slow(PreTrainedTokenizer):
        """Letters, and a space in front of every piece."""

        vocab_size = len(LETTERS) + 1

        def __init__(self):
            super().__init__(unk_token=None)

        def get_vocab(self):
            return {"▁": 0, **{letter: i for i, letter in enumerate(LETTERS, 1)}, **self._added_tokens_encoder}

        def _tokenize(self, text, **kwargs):
            return ["▁", *text]

        def _convert_token_to_id(self, token):
            return "▁".join(["", LETTERS]).index(token)

        def _convert_id_to_token(self, index):
            return ("▁" + LETTERS)[index]

    tokenizer = Slow()
    tokenizer.add_tokens([AddedToken("<tool>"), AddedToken("<eot>", special=True)])
    text = "a<tool>b<eot>"
    assert len(tokenizer(text)["input_ids"]) < len(text)
    expected = [("▁" + LETTERS).index(letter) for letter in "▁" + text]
    assert ICLNode(text, special_tokens="text").tokenize(tokenizer).tolist() == expected
