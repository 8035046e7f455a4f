"""What ``psykern models`` prints: which kinds of model are native, which go through transformers, and what is refused.

The tables are ``models/tested.tsv`` and ``models/foreign/tested.tsv``, which ``tests/support/models_page.py`` writes
from the tests; README has the same.
"""

from __future__ import annotations

from pathlib import Path

_MODELS = Path(__file__).parent / "models"
_NATIVE, _FOREIGN = _MODELS / "tested.tsv", _MODELS / "foreign" / "tested.tsv"
_TESTED = """\
Random checkpoints of each are compared with transformers in fp64 on transcripts that share what they begin with, with
answer options, and with prefixes carried from wave to wave: every token is within 1e-4 nats, under the backends cpu and
reference (triton on a GPU), with the weights where they are and streamed. A config with more is refused by name."""
_THROUGH_TRANSFORMERS = """\
Through transformers (--implementation transformers): any causal language model that it has. Its own modules compute the
layers, psykern plans the tokens and scores them. Where psykern's attention can stand in, common beginnings are computed
once; elsewhere there is one pass for each sequence, which is slower, and the manifest says why. Tested of these, random
checkpoints against the library's own forward in fp64:"""

# What is refused, by name in the error; and why. A test has a folder of each.
REFUSED = {
    "encoder-decoders (t5, bart, …)": "expected a causal language model",
    "models that are not causal (bert, …)": "a token's score would know what comes after it",
    "models whose code is in their folder (auto_map)": "nothing of a folder is executed (trust_remote_code stays off)",
    "a model_type that transformers does not have": "nobody here knows how it is computed",
    "pickled weights (pytorch_model.bin)": "loading them can run code; convert them to safetensors",
    "quantised weights through transformers": "the native kinds read them, see README",
}


def models_table() -> str:
    """A table of the native kinds, one of what goes through transformers, and a line for each thing that is refused."""
    refused = _aligned([[what, why] for what, why in REFUSED.items()])
    parts = [_table(_NATIVE), _TESTED, _THROUGH_TRANSFORMERS + "\n\n" + _table(_FOREIGN), "Refused:\n" + refused]
    return "\n\n".join(parts)


def _table(path: Path) -> str:
    """One line for each ``model_type``, under a line of headings."""
    return _aligned([line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()])


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
