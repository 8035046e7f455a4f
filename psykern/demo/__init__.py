"""The demo's assets: a small real sample of transcripts, a tiny model that was trained on other participants, and
what a second tiny model, post-trained from it, has otherwise.

The models are a demonstration of the pipeline, not of language models: see :mod:`psykern.demo.train` and
:mod:`psykern.demo.posttrain`, which made them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

SAMPLE = Path(__file__).parent / "sample"  # one .jsonl.gz per study
MODEL = Path(__file__).parent / "model"  # a Hugging Face model folder
POSTTRAINED = Path(__file__).parent / "posttrained" / "changed.safetensors"  # weights that differ from MODEL's
MODELS = Path(__file__).parent / "models.yaml"  # what a comparison needs to know of the two
DOMAINS = Path(__file__).parent / "domains.csv"  # of the sample's studies


def build_posttrained(folder: Path, *, changed: Path = POSTTRAINED) -> Path:
    """Write the post-trained model's folder: MODEL's files with the tensors of ``changed`` in place of their own."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    for file in MODEL.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, folder / file.name)
    weights = load_file(MODEL / "model.safetensors") | load_file(changed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
