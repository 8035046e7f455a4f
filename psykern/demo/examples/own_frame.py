"""Scores a data frame of one's own: no files, no folder.

A frame of pandas or polars, a table of pyarrow, a dataset of ``datasets`` or a list of dicts are all taken as they are.
"""

from __future__ import annotations

import pyarrow as pa

import psykern
from psykern import demo

FRAME = pa.table(
    {
        "participant": ["ana", "ben", "cem"],
        "text": [
            "You see a red light. You press <<A>>. You see a green light. You press <<B>>.",
            "You see a red light. You press <<B>>. You see a green light. You press <<B>>.",
            "You see a red light. You press <<A. You see a green light. You press <<B>>.",  # a mark is not closed
        ],
        "options": [["A", "B"]] * 3,
    }
)


def main() -> None:
    rejects: list[psykern.Reject] = []
    with psykern.load(demo.MODEL) as scorer:
        records = scorer.score(FRAME, study="lights", rejects=rejects)  # a pyarrow.Table: records.to_pandas() works
    print("participant  response  logprob  log-softmax over A, B")
    for record in records.to_pylist():
        of_options = ", ".join(f"{value:.2f}" for value in record["option_log_softmax"])
        print(f"{record['participant']:<12} {record['response']:<9} {record['logprob']:7.2f}  {of_options}")
    for reject in rejects:
        print(f"row {reject.index} was left out: {reject.reason}")


if __name__ == "__main__":
    main()
