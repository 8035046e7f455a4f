"""Settings: what they refuse, and what their fields say of themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from psykern import Settings
from psykern.core.settings import fields, having


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "Exact"}, "protocol: expected one of exact, study, got 'Exact'"),
        ({"options": "all"}, "options: expected one of none, given, observed"),
        ({"boundary": "both"}, "boundary: expected one of joint, split, got 'both'"),
        ({"over_length": "cut"}, "over_length: expected one of error, skip, truncate, got 'cut'"),
        ({"dtype": "float64"}, "dtype: expected one of auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "device: expected auto, cpu, cuda or cuda:N, N from 0 on, got 'gpu'"),
        ({"device": "cuda:-1"}, "device: expected auto, cpu, cuda or cuda:N, N from 0 on, got 'cuda:-1'"),
        ({"device": "cpu:0"}, "device: expected auto, cpu, cuda or cuda:N, N from 0 on, got 'cpu:0'"),
        ({"device": None}, "device: expected auto, cpu, cuda or cuda:N, N from 0 on, got None"),
        ({"max_options": 0}, "max_options: expected at least 1, got 0"),
        ({"limit": -1}, "limit: expected at least 1, got -1"),
        ({"limit": "5"}, "limit: expected a whole number, got '5'"),
        ({"limit": 2.0}, r"limit: expected a whole number, got 2\.0"),
        ({"limit": True}, "limit: expected a whole number, got True"),
        ({"studies": "bandit"}, "studies: expected names, at least one, or None for all, got 'bandit'"),
        ({"studies": ()}, r"studies: expected names, .* got \(\)"),
        ({"studies": (5,)}, r"studies: expected names, .* got \(5,\)"),
        ({"wave_tokens": 0}, "wave_tokens: expected at least 1"),
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1"),
        ({"min_share": 0}, "min_share: expected at least 1"),
        ({"condition": "vision"}, "condition: expected one of plain, chat, persona, got 'vision'"),
        ({"discrete": "[A-"}, r"discrete: expected a regular expression, got '\[A-': unterminated"),
        ({"date": "27 Nov 2026"}, "date: expected a day as YYYY-MM-DD, got '27 Nov 2026'"),
        ({"date": "2026-02-29"}, "date: expected a day as YYYY-MM-DD, got '2026-02-29'"),
        ({"date": "20261127"}, "date: expected a day as YYYY-MM-DD, got '20261127'"),
        ({"date": "2026-11-27T00:00"}, "date: expected a day as YYYY-MM-DD, got '2026-11-27T00:00'"),
        ({"date": ""}, "date: expected a day as YYYY-MM-DD, got ''"),
        ({"date": 20261127}, "date: expected a day as YYYY-MM-DD, got 20261127"),
        ({"marks": "some"}, "marks: expected one of keep, drop, got 'some'"),
        ({"protocol": "study", "boundary": "split"}, "boundary: .* boundary='joint'"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_settings_say_what_they_expect(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_the_same_studies_are_the_same_choice() -> None:
    """Else a run would not go on, and not be compared, where a command names them in another order."""
    assert Settings(studies=("b", "a", "b")) == Settings(studies=["a", "b"])  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    """And become Python's, as manifests and the keys of token caches are JSON."""
    assert type(Settings(limit=np.int64(5)).limit) is int  # type: ignore[arg-type]


def test_every_field_says_what_it_is() -> None:
    assert list(fields()) == [f.name for f in dataclasses.fields(Settings)]
    assert all(about.help for _, about in fields().values())


def test_what_tokens_depend_on_is_part_of_a_runs_identity() -> None:
    """Else two runs with other tokens would share a folder."""
    assert set(having("tokens")) < set(having("identity"))
    assert set(having("compared")) < set(having("identity"))
    expected = {"over_length", "implementation", "backend", "dtype", "min_share"}
    assert set(having("identity")) - set(having("tokens")) == expected
