"""The demo's assets: a small real sample of transcripts and a tiny model that was trained on other participants.

The model is a demonstration of the pipeline, not of a language model: see :mod:`psykern.demo.train`, which made both.
"""

from __future__ import annotations

from pathlib import Path

SAMPLE = Path(__file__).parent / "sample"  # one .jsonl.gz per study
MODEL = Path(__file__).parent / "model"  # a Hugging Face model folder
