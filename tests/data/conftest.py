"""A tokenizer whose tokens can be read off, and the real ones with the real transcripts."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.tiny import build_tiny, load, transcript

from psykern.core.types import Transcript
from psykern.data.tokenizer import Tokenizer


@pytest.fixture
def tiny(tmp_path: Path) -> Tokenizer:
    return load(build_tiny(), tmp_path)


@pytest.fixture
def tiny_bos(tmp_path: Path) -> Tokenizer:
    return load(build_tiny(bos=True), tmp_path)


@pytest.fixture(scope="session")
def real(shared: Path) -> Callable[[str], Tokenizer]:
    return cache(lambda name: Tokenizer.load(shared / "tokenizers" / name))


@pytest.fixture(scope="session")
def study_rows(shared: Path) -> Callable[..., list[Transcript]]:
    @cache
    def rows(study: str, count: int, experiment: str = "") -> list[Transcript]:
        with gzip.open(shared / "psych" / f"{study}.jsonl.gz", "rt", encoding="utf-8") as lines:
            every = (json.loads(line) for line in lines)
            wanted = (row for row in every if experiment in row["experiment"])
            return [transcript(row["text"]) for row in itertools.islice(wanted, count)]

    return rows
