"""The command line, run as a user runs it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import leattn
from leattn import ICLGraph, ICLNode, cli

PNG = b"\x89PNG"


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments, cwd=".", encoding="utf-8"):
    """What the console script does, in this process: importing torch anew for every command would take minutes."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    here = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["leattn", *map(str, arguments)])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        os.chdir(cwd)
        try:
            with pytest.raises(SystemExit) as left:
                cli.main()
        finally:
            os.chdir(here)
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(encoding))
    return Result(left.value.code or 0, *texts)


def succeeds(*arguments, **options):
    result = run(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fails(*arguments, **options):
    """The one line on stderr."""
    result = run(*arguments, **options)
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def prompt_file(tmp_path):
    fact = ICLNode("\nThe capital of Zarvia is Moville.", id="fact")
    other = ICLNode("\nThe capital of Genia is Lumo.", id="other")
    path = tmp_path / "prompt.yaml"
    ICLGraph(ICLNode("\nQ: What is the capital of Zarvia?\nA:", [fact, other], id="Q")).to_file(path)
    return path


@pytest.fixture
def ids_file(tmp_path):
    path = tmp_path / "ids.json"
    ICLGraph(ICLNode([3, 4], [ICLNode([1, 2], id="a")], id="b")).to_file(path)
    return path


def test_the_demo_writes_three_pictures_and_follows_the_edge(tmp_path):
    out = succeeds("demo", "--out", "here/out", cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "here/out").iterdir()) == ["attention.png", "dag.png", "mask.png"]
    assert all(path.read_bytes().startswith(PNG) for path in (tmp_path / "here/out").iterdir())
    for name in ("dag.png", "mask.png", "attention.png"):
        assert f"here/out/{name}" in out
    assert "└── Q" in out
    assert "■" in out
    answers = [line.split() for line in out.splitlines() if "right answer:" in line]
    assert len(answers) == 2
    for words in answers:
        assert words[words.index("answer:") + 1] == words[-1]
    assert answers[0][-1] != answers[1][-1]


def test_render_a_graph_needs_no_tokenizer(prompt_file, tmp_path):
    assert succeeds("render", prompt_file, "-o", tmp_path / "dag.png", "--kind", "dag").strip() == str(tmp_path / "dag.png")
    assert (tmp_path / "dag.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["mask.png", "mask.svg", "mask.pdf"])
def test_render_a_mask(prompt_file, tmp_path, name):
    succeeds("render", prompt_file, "--output", tmp_path / name, "--tokenizer", "tiny")
    assert (tmp_path / name).stat().st_size > 1000


def test_render_token_ids_without_tokenizer(ids_file, tmp_path):
    succeeds("render", ids_file, "-o", tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes().startswith(PNG)


def test_render_text_without_tokenizer(prompt_file, tmp_path):
    message = fails("render", prompt_file, "-o", tmp_path / "mask.png")
    assert message.startswith("leattn: node 'fact' holds text")
    assert "give --tokenizer" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "mask.png").exists()


def test_generate_prints_the_text(prompt_file):
    out = succeeds("generate", prompt_file, "--model", "tiny", "--max-new-tokens", "1")
    assert out.strip() == "Moville"


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_generate_takes_options(prompt_file, backend):
    options = ["--backend", backend, "--positions", "sequential", "--visibility", "ancestors", "--dtype", "float32"]
    assert succeeds("generate", prompt_file, "--model", "tiny", "--max-new-tokens", "1", "--device", "cpu", *options)


def test_generate_samples_with_a_seed(prompt_file):
    def sample(seed):
        return succeeds("generate", prompt_file, "--model", "tiny", "--max-new-tokens", "12", "--seed", seed)

    assert sample(1) == sample(1)


def test_generate_from_a_saved_model(prompt_file, tmp_path):
    model, tokenizer = leattn.tiny.load()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = succeeds("generate", prompt_file, "--model", tmp_path / "model", "--max-new-tokens", "1")
    assert out.strip() == "Moville"


def test_check_prints_the_report():
    out = succeeds("check", "--model", "tiny")
    assert "sdpa" in out
    assert "yes" in out


def test_version_and_help():
    assert succeeds("--version").strip() == leattn.__version__
    for command in ([], ["demo"], ["render"], ["generate"], ["check"]):
        assert "Usage" in succeeds(*command, "--help")


def test_the_console_script_is_installed(tmp_path):
    script = Path(sys.executable).parent / "leattn"
    result = subprocess.run([script, "render", "absent.yaml", "-o", "x.png"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "leattn: absent.yaml: No such file or directory\n")


def bad_file(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes: [{id: A, content: a, parents: [B]}, {id: B, content: b, parents: [A]}]", "the graph has a cycle: A → B → A"),
        ("nodes: [{id: A, content: a, parents: [B]}]", "names the parent 'B', which is not in the graph"),
        ("nodes: [{id: A, content: a}, {id: A, content: b}]", "id 'A' is given to two nodes"),
        ("nodes: [{id: A, content: ''}]", "node 'A' has no content"),
        ("nodes: [{id: A, content: a, start_pos_id: 1, end_pos_id: 4}]", "both start_pos_id=1 and end_pos_id=4"),
        ("nodes: [{id: A, content: a, start_pos_id: -1}]", "start_pos_id=-1; positions start at 0"),
        ("nodes: [}", "is not a prompt file"),
    ],
)
@pytest.mark.parametrize("command", ["render", "generate"])
def test_bad_prompt_files_are_one_line(tmp_path, text, words, command):
    rest = ["-o", tmp_path / "x.png", "--kind", "dag"] if command == "render" else ["--model", "tiny"]
    message = fails(command, bad_file(tmp_path, text), *rest)
    assert message.count("\n") == 1
    assert "bad.yaml" in message
    assert words in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "absent.yaml", "--model", "tiny"], "absent.yaml: No such file or directory"),
        (["generate", "prompt.yaml", "--model", "no-such-folder/model"], "cannot load 'no-such-folder/model'"),
        (["check", "--model", "."], "cannot load '.'"),
        (["generate", "prompt.yaml", "--model", "tiny", "--positions", "random"], "unknown positions 'random'; choose one of"),
        (["generate", "prompt.yaml", "--model", "tiny", "--visibility", "all"], "unknown visibility 'all'; choose one of"),
        (["generate", "prompt.yaml", "--model", "tiny", "--backend", "fast"], "unknown backend 'fast'"),
        (["generate", "prompt.yaml", "--model", "tiny", "--device", "toaster"], "device 'toaster' cannot be used"),
        (["render", "prompt.yaml", "-o", "x.docx", "--kind", "dag"], "x.docx"),
        (["render", "prompt.yaml", "-o", "absent/x.png", "--kind", "dag"], "absent/x.png: No such file or directory"),
    ],
)
def test_other_mistakes_are_one_line(prompt_file, arguments, words):
    message = fails(*arguments, cwd=prompt_file.parent)
    assert message.startswith("leattn: ")
    assert words in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["render"], ["generate", "prompt.yaml"], ["render", "prompt.yaml", "-o", "x.png", "--kind", "cube"]],
)
def test_usage_errors_have_status_2(prompt_file, arguments):
    result = run(*arguments, cwd=prompt_file.parent)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "Usage" in result.stderr


def test_a_terminal_without_unicode(prompt_file, tmp_path):
    assert "?" in fails("generate", bad_file(tmp_path, "nodes: [{id: Ж, content: ''}]"), "--model", "tiny", encoding="latin-1")
    # └ and ■ become question marks; the demo must not die on them.
    assert "?" in succeeds("demo", "--out", tmp_path, encoding="latin-1")
