"""Writes what is tested of each ``model_type``: ``PYTHONPATH=.:tests python tests/support/models_page.py``.

From CONFIGS to psykern/models/tested.tsv, and from CASES of ``foreign_cases`` to psykern/models/foreign/tested.tsv,
which ``psykern models`` prints; README has both between markers. ``test_tested.py`` fails where they are others.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from support.checkpoints import CONFIGS, SIZES, config_of
from support.foreign_cases import CASES, VOCABULARY, Case

from psykern.models.families import FAMILIES, parse_spec
from psykern.models.foreign.probe import read_foreign_spec
from psykern.models.layer import LayerSpec
from psykern.models.mlp import MlpSpec
from psykern.models.spec import ModelSpec

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TABLE, FOREIGN_TABLE = (ROOT / "psykern" / "models" / name for name in ("tested.tsv", "foreign/tested.tsv"))
BEGIN, END = "<!-- written by tests/support/models_page.py -->\n", "<!-- end -->\n"  # around each of both tables

HEADINGS = ("model_type", "checkpoints", "rotary embedding", "windows", "head", "layers")
CHECKPOINTS = {
    "llama": "Llama 3 to 3.2, R1-Distill-Llama",
    "qwen2": "Qwen1.5 to Qwen2.5, R1-Distill-Qwen",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3, mixtures of experts",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3, 3.1",
    "qwen2_5_vl": "Qwen2.5-VL, on text",
    "qwen3_vl": "Qwen3-VL, on text",
    "qwen3_vl_moe": "Qwen3-VL, mixtures of experts, on text",
    "mllama": "Llama 3.2 Vision, on text",
}


FOREIGN_HEADINGS = ("model_type", "checkpoints", "common beginnings")
FOREIGN_CHECKPOINTS = {
    "gpt2": "GPT-2, DistilGPT-2",
    "gpt_neox": "Pythia, GPT-NeoX",
    "opt": "OPT",
    "mistral": "Mistral 7B",
    "phi3": "Phi-3, Phi-4-mini",
    "gemma3_text": "Gemma 3",
    "olmoe": "OLMoE, mixtures of experts",
    "cohere": "Command R",
    "phi": "Phi-1.5, Phi-2",
    "llama": "what is native, too",
    "gemma2": "Gemma 2",
    "bloom": "BLOOM (ALiBi)",
    "mamba": "Mamba",
    "gpt_oss": "gpt-oss",
}
Table = Sequence[tuple[str, ...]]


def table() -> Table:
    """The headings and a row for each family."""
    return [HEADINGS, *(row(kind) for kind in FAMILIES)]


def foreign_table() -> Table:
    """The same of what transformers computes."""
    kinds = dict.fromkeys(case.config["model_type"] for case in CASES.values())
    assert set(kinds) == set(FOREIGN_CHECKPOINTS), f"expected checkpoints of {list(kinds)}"
    rows = []
    for kind in kinds:
        how = (beginnings(case) for case in CASES.values() if case.config["model_type"] == kind)
        rows.append((kind, FOREIGN_CHECKPOINTS[kind], listed(how, "; ")))
    return [FOREIGN_HEADINGS, *sorted(rows, key=lambda row: not row[2].startswith("computed once"))]


def beginnings(case: Case) -> str:
    """What becomes of them, as psykern sees it by the config alone."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"vocab_size": VOCABULARY, "pad_token_id": None, **case.config}
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        spec = read_foreign_spec(Path(folder))
    if spec.reason is not None:
        return f"one pass per sequence: {re.sub('^layer 0 has ', '', spec.reason)}"
    return "computed once" + (", by its own attention" if any(layer.mixer.is_own for layer in spec.layers) else "")


def row(kind: str) -> tuple[str, ...]:
    configs = [config for config in CONFIGS.values() if config["model_type"] == kind]
    assert configs, f"{kind}: no entry of CONFIGS, so nothing is tested of it"
    specs = [parse_spec(json.loads(config_of(SIZES | config).to_json_string()), kind) for config in configs]
    layers = dict.fromkeys(layer for spec in specs for layer in spec.layers)
    return (
        kind,
        CHECKPOINTS[kind],
        listed(rope for config in configs for rope in ropes(config)),
        "yes" if any(layer.mixer.window for layer in layers) else "no",
        listed("tied" if spec.has_tied_head else "its own" for spec in specs),
        listed((what for of in (map(parts, layers), map(around, specs)) for each in of for what in each), "; "),
    )


def ropes(config: dict[str, Any]) -> list[str]:
    """The kinds of rotary embedding, of the layers with full attention first."""
    said = config.get("rope_parameters", {})
    kinds = [of.get("rope_type", "default") for of in ([said] if "full_attention" not in said else said.values())]
    return [f"{kind} on several axes" if "mrope_section" in said else kind for kind in kinds]


def parts(layer: LayerSpec) -> list[str]:
    """What a layer has that the plainest has not."""
    mixer, ffn = layer.mixer, layer.ffn
    found = {
        "biases of q, k, v": mixer.qkv_bias,
        "bias of o": mixer.o_bias,
        "biases of the feed-forward part": isinstance(ffn, MlpSpec) and ffn.has_bias,
        "experts": not isinstance(ffn, MlpSpec),
        "q and k normed by head": mixer.qk_norm == "head",
        "q and k normed": mixer.qk_norm == "projection",
        "norms behind": layer.norms.place == "after",
        "one key head": mixer.num_kv_heads == 1,
        "ungrouped heads": mixer.num_kv_heads == mixer.num_heads,
    }
    return [what for what, is_there in found.items() if is_there]


def around(spec: ModelSpec) -> list[str]:
    found = {"cross-attention skipped": bool(spec.skipped), "more embedding rows": spec.embedding_rows is not None}
    return [what for what, is_there in found.items() if is_there]


def listed(found: Iterable[str], between: str = ", ") -> str:
    return between.join(dict.fromkeys(found)) or "–"


def as_tsv(table: Table) -> str:
    return "".join("\t".join(cells) + "\n" for cells in table)


def in_readme(text: str) -> str:
    """``text`` with the tables between the markers, the native one first."""
    before, *parts = text.split(BEGIN)
    for which, part in zip((table(), foreign_table()), parts, strict=True):
        head, *rows = [f"| {' | '.join(cells)} |\n" for cells in which]
        _, _, behind = part.partition(END)
        before += BEGIN + head + "|---" * len(which[0]) + "|\n" + "".join(rows) + END + behind
    return before


if __name__ == "__main__":
    TABLE.write_text(as_tsv(table()), encoding="utf-8")
    FOREIGN_TABLE.write_text(as_tsv(foreign_table()), encoding="utf-8")
    README.write_text(in_readme(README.read_text(encoding="utf-8")), encoding="utf-8")
