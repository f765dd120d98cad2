"""What every test shares: no display, no network, and examples of hypothesis that do not depend on the machine's speed."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "LEATTN_CACHE" not in os.environ:  # the first of several workers makes the folder for all
    os.environ["LEATTN_CACHE"] = tempfile.mkdtemp(prefix="leattn-")
    atexit.register(shutil.rmtree, os.environ["LEATTN_CACHE"], ignore_errors=True)

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "leattn", deadline=None, max_examples=50, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("leattn")


@pytest.fixture(scope="session")
def words():
    """A tokenizer without merges or specials: one token per word and per punctuation mark, any word is known by its id."""
    from oracles import word_tokenizer

    return word_tokenizer("example1 example2 example3 What does the fox say one two three four five six seven eight . ? ,")
