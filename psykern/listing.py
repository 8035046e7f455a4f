"""What ``psykern models`` prints: each ``model_type``, and what is tested of it.

The table is ``models/tested.tsv``, which ``tests/support/models_page.py`` writes from the tests; README has the same.
"""

from __future__ import annotations

from pathlib import Path

_TABLE = Path(__file__).parent / "models" / "tested.tsv"
_TESTED = """\
Random checkpoints of each are compared with transformers in fp64 on transcripts that share what they begin with, with
answer options, and with prefixes carried from wave to wave: every token is within 1e-4 nats, under the backends cpu and
reference (triton on a GPU), with the weights where they are and streamed. A config with more is refused by name."""


def models_table() -> str:
    """One line for each ``model_type``, under a line of headings."""
    rows = [line.split("\t") for line in _TABLE.read_text(encoding="utf-8").splitlines()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", _TESTED])
