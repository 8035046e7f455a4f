"""The documents of the task ``psykern_lotteries``."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

from datasets import Dataset

from psykern.demo import SAMPLE

_PROBLEM = re.compile(r"(Lottery A: .*\nLottery B: .*)\nYou chose lottery <<([AB])>>")
_NUM_EXAMPLES = 10  # of the first player, to stand before the others' problems


def documents(**_: Any) -> dict[str, Dataset]:
    """Columns ``problem``, ``choice``; in the splits ``examples`` and ``test``."""
    with gzip.open(SAMPLE / "frey2017mpl.jsonl.gz", "rt", encoding="utf-8") as lines:
        first, *others = [_PROBLEM.findall(json.loads(line)["text"]) for line in lines]
    splits = {"examples": first[:_NUM_EXAMPLES], "test": [problem for player in others for problem in player]}
    columns = ("problem", "choice")
    return {
        name: Dataset.from_list([dict(zip(columns, row, strict=True)) for row in own]) for name, own in splits.items()
    }
