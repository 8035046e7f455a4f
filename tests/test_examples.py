"""The examples run as a user runs them, and what they print is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import psykern
from psykern import demo
from psykern.demo.examples import many_participants, own_frame, trial_by_trial, word_surprisal

EXAMPLES = sorted(Path(own_frame.__file__).parent.glob("[!_]*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_by_its_name(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"psykern.demo.examples.{path.stem}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") > 1
    assert "Warning" not in done.stderr


def test_own_frame_names_the_row_that_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    own_frame.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [["ana", "A"], ["ana", "B"], ["ben", "B"], ["ben", "B"]]
    assert lines[-1].startswith("row 2 was left out: text: '<<'")


def test_trial_by_trial_prints_what_the_records_of_its_transcript_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trial_by_trial.main()
    out = capsys.readouterr().out
    played = re.findall(r"presses ([AB]) and (wins|loses)", out)
    told = "".join(f"You press <<{machine}>>. You get {int(won == 'wins')} points.\n" for machine, won in played)
    with psykern.load(demo.MODEL) as scorer:
        records = scorer.score([{"text": trial_by_trial.INSTRUCTIONS + told, "options": ["A", "B"]}]).to_pylist()
    assert len(records) == trial_by_trial.NUM_TRIALS
    nll = -sum(record["option_log_softmax"][record["option_index"]] for record in records) / len(records)
    printed = re.search(r"mean NLL of a choice: ([\d.]+)", out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(nll, abs=6e-4)  # three digits


def test_many_participants_all_begin_alike(capsys: pytest.CaptureFixture[str]) -> None:
    many_participants.main()
    shares = [float(text) for text in capsys.readouterr().out.splitlines()[-1].split()]
    assert len(shares) == many_participants.NUM_TRIALS
    with psykern.load(demo.MODEL) as scorer:
        first = scorer.choose(many_participants.INSTRUCTIONS + "You press <<", many_participants.OPTIONS)
    share = 2.718281828 ** float(first.log_softmax[0])
    # Five standard errors of a share among as many participants.
    assert abs(shares[0] - share) < 5 * (share * (1 - share) / many_participants.NUM_PARTICIPANTS) ** 0.5


def test_word_surprisal_prints_each_word_with_its_characters(capsys: pytest.CaptureFixture[str]) -> None:
    word_surprisal.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == word_surprisal.SENTENCE.split()
    for word, bits, _, place in rows:
        first, stop = map(int, place.split("-"))
        assert word_surprisal.SENTENCE[first:stop] == word
        assert float(bits) > 0


README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
CODE = [
    pytest.param(code, id=section.partition("\n")[0])  # its heading
    for section in README.split("\n## ")
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
]


@pytest.mark.parametrize("code", CODE)
def test_the_readme_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
