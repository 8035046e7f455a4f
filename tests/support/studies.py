"""Names of the real studies and tokenizers in the shared data folder, and types of the fixtures that read them."""

from __future__ import annotations

from collections.abc import Callable

from psykern.core.types import Transcript
from psykern.data.tokenizer import Tokenizer

STUDIES = (
    "alsobay2025publicGoodsGame",
    "dezfouli2019",
    "franke2024bayesian",
    "frey2017mpl",
    "guenther2023ViSpa",
    "guenther2023associations_individual",
    "guenther2024substitutions",
    "haridi2024memory",
    "jagadish2023zero",
    "little2024functionestimation",
    "schiekiera2025metascience",
    "shahar2019twosteptask",
    "spektor2024lossaversion",
    "thoma2025riskychoice",
    "vantiel2021probabilistic_pragmatics",
)


TOKENIZERS = ("qwen3", "llama-3.1", "olmo-dolma2")

RealTokenizers = Callable[[str], Tokenizer]  # by name
StudyRows = Callable[..., list[Transcript]]  # study, count, and what the experiment's name contains

RealTokenizers = Callable[[str], Tokenizer]  # by name
StudyRows = Callable[..., list[Transcript]]  # study, count, and what the experiment's name contains
