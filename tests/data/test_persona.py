"""What is known of a participant, and the interview made of it."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.rows import accepted, find

from psykern.data import persona
from psykern.data.read import read


@pytest.mark.parametrize(
    ("row", "known"),
    [
        ({"age": 24}, [("age", "24.0")]),
        ({"age": "33.0", "gender": "Female"}, [("age", "33.0"), ("gender", "female")]),
        ({"sex": "male", "location": "Basel"}, [("gender", "male"), ("nationality", "Switzerland")]),
        ({"age": 101}, []),
        ({"age": "old"}, []),
        ({"age": math.nan, "gender": None, "education": "N/A", "IUS": ""}, []),
        ({"age": True, "gender": ["F"], "PHQ": {}}, []),
        ({"gender": "Prefer not to say", "diagnosis": "Healthy"}, []),
        ({"gender": "N/A", "sex": "M"}, [("gender", "male")]),
        ({"diagnosis": "Bipolar"}, [("clinical diagnosis", "bipolar")]),
        ({"BIS-10": 60.0, "phq8": 3.0, "IUS": 41.5, "STAI": 30.0},
         [("STAI-S", "30.0"), ("IUS", "41.5"), ("PHQ-8", "3"), ("BIS-10", "60")]),
        ({"condition": "unique", "text": "x", "Age": 3}, []),
    ],
)  # fmt: skip
def test_what_a_row_tells(row: dict[str, Any], known: list[tuple[str, str]]) -> None:
    assert list(persona.metadata(row)) == known


def test_the_interview_is_the_published_one() -> None:
    known = persona.metadata({"PHQ": 4, "clinical diagnosis": "depression", "age": 24, "BAS Drive": "11"})
    assert persona.interview(known) == (
        "Interviewer: What is your age?\nInterviewee: 24.0\n\n"
        "Interviewer: Do you have any clinical diagnoses?\nInterviewee: depression\n\n"
        "Interviewer: What is your PHQ-9 score?\nInterviewee: 4\n\n"
        "Interviewer: What is your BAS Drive score?\nInterviewee: 11\n\n"
    )
    assert persona.interview(()) == ""


def test_the_published_order() -> None:
    page = "age, gender, nationality, education, clinical diagnosis, STICSA-T somatic, STICSA-T cognitive, STAI-S, "
    page += "STAI-T, IUS, RRQ, AUDIT, DAST, PSWQ, GAD-7, SDS, OCI, PHQ-9, PHQ-8, BAS Drive, BAS Fun Seeking, "
    page += "BAS Reward Responsiveness, BDI-II, BIS-11, BIS-10"
    assert [field.name for field in persona.FIELDS] == page.split(", ")


def test_real_rows_carry_it(shared: Path) -> None:
    for study, names in (("frey2017mpl", ("age", "gender", "nationality")), ("haridi2024memory", ())):
        file = shared / "psych" / f"{study}.jsonl.gz"
        with gzip.open(file, "rt") as lines:
            rows = [json.loads(line) for _, line in zip(range(5), lines, strict=False)]
        got = list(accepted(read(find(file), limit=5)))
        assert [tuple(name for name, _ in transcript.metadata) for transcript in got] == [names] * 5
        if names:
            assert [dict(t.metadata)["age"] for t in got] == [f"{row['age']}.0" for row in rows]
