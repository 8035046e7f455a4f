"""What a run says of itself: its recipe, its outcome, hashes, counts and times."""

from __future__ import annotations

import json
import math
import re
import shutil
from datetime import datetime
from pathlib import Path

import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from support.quantised import bitsandbytes_int8, quantise
from support.records import recipe
from support.scoring import (
    score,
    sha256,
)
from support.toy import (
    Toy,
    write_rows,
)

import psykern
from psykern import Run, Settings
from psykern.engine.budgets import CPU_BUDGETS
from psykern.runs.manifest import tokens_depend_on


def test_the_manifest_says_how_the_run_was_made(toy: Toy, toy_run: Run) -> None:
    manifest = json.loads((toy_run.folder / "manifest.json").read_text())
    assert manifest["model_id"] == str(toy.model)
    assert manifest["model_hash"].startswith("sha256:")
    assert manifest["tokenizer_hash"] == sha256(toy.model / "tokenizer.json")
    size = toy.data.stat().st_size
    assert manifest["data"] == [{"path": str(toy.data), "hash": sha256(toy.data), "bytes": size}]
    settings = Settings()
    for name in ("protocol", "boundary", "options", "max_options", "over_length", "limit", "studies"):
        assert manifest[name] == getattr(settings, name)
    assert (manifest["wave_tokens"], manifest["batch_tokens"]) == (CPU_BUDGETS.wave_tokens, CPU_BUDGETS.batch_tokens)
    assert manifest["peak_device_bytes"] is None and manifest["gpu_idle_share"] is None
    assert (manifest["device"], manifest["dtype"]) == ("cpu", "float32")
    assert manifest["backend"] == psykern.kernels.resolve("auto", torch.device("cpu"))
    assert {"psykern", "python", "torch", "transformers", "tokenizers", "numpy", "pyarrow"} <= set(manifest["versions"])
    assert manifest["versions"]["psykern"] == psykern.__version__
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["peak_memory_bytes"] > 2**20
    started, finished = (datetime.fromisoformat(manifest[name]) for name in ("started", "finished"))
    assert started <= finished
    assert started.utcoffset() is not None


def test_the_manifest_says_what_was_dequantised(toy: Toy, toy_run: Run, tmp_path: Path) -> None:
    """A plan needs the config alone."""
    model = Path(shutil.copytree(toy.model, tmp_path / "model"))
    quantise(model, bitsandbytes_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    run = score(model, toy.data, tmp_path / "run", limit=1)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["weights"] == run.manifest.weights
    assert re.fullmatch("bitsandbytes int8, activations not quantised; [0-9]+ tensors dequantised", manifest["weights"])
    assert json.loads((toy_run.folder / "manifest.json").read_text())["weights"] is None
    (model / "model.safetensors").unlink()
    assert psykern.estimate(model, toy.data, Settings(limit=1)).studies


@pytest.fixture
def hub(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub where every model is the toy; gives the revisions that were asked for."""
    asked: list[str] = []

    def snapshot_download(repo_id: str, *, revision: str, **_: object) -> str:
        assert repo_id == "owner/toy"
        asked.append(revision)
        return str(toy.model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(("model", "revision"), [("owner/toy@v1", None), ("owner/toy", "v1")], ids=["name", "keyword"])
def test_the_manifest_names_the_revision(
    model: str, revision: str | None, hub: list[str], toy: Toy, toy_run: Run, tmp_path: Path
) -> None:
    settings = Settings(device="cpu", limit=1)
    run = psykern.score(model, toy.data, tmp_path / "run", settings, revision=revision)
    assert (run.manifest.model_id, run.manifest.model_hash) == ("owner/toy@v1", toy_run.manifest.model_hash)
    (run,) = psykern.score_conditions(model, toy.data, tmp_path / "each", ["plain"], settings, revision=revision)
    assert run.manifest.model_id == "owner/toy@v1"
    psykern.estimate(model, toy.data, settings, revision=revision)
    assert hub == ["v1"] * 3


def test_a_revision_of_a_folder_is_refused_before_anything_is_made(toy: Toy, tmp_path: Path) -> None:
    for score_it in (psykern.score, psykern.score_on_cluster):
        with pytest.raises(psykern.CheckpointError, match="revision 'v1': expected none"):
            score_it(toy.model, toy.data, tmp_path / "run", revision="v1")
    with pytest.raises(psykern.CheckpointError, match="revision 'v1': expected none"):
        psykern.estimate(toy.model, toy.data, revision="v1")
    assert not (tmp_path / "run").exists()


def test_the_manifest_counts_time(toy_run: Run) -> None:
    seconds = dict(toy_run.manifest.seconds)
    total = seconds.pop("total")
    assert set(seconds) >= {"load", "read", "encode", "plan", "run", "write", "hash"}
    assert min(seconds.values()) > 0
    assert max(seconds.values()) <= total  # the phases overlap
    counts = toy_run.manifest.counts
    assert toy_run.manifest.tokens_per_second == pytest.approx(counts.tokens / total, rel=0.1)
    assert toy_run.manifest.responses_per_second == pytest.approx(counts.responses / total, rel=0.1)


@pytest.mark.parametrize("min_share", [1, 10**6], ids=["shared", "unshared"])
def test_the_manifest_counts_tokens(toy: Toy, tmp_path: Path, min_share: int) -> None:
    """A transcript's last scored token is predicted, not computed; what is shared is a trie of the others."""
    counts = score(toy.model, toy.data, tmp_path, options="none", min_share=min_share).manifest.counts
    spans = [toy.oracle.spans(row["text"], "exact", "joint") for row in toy.rows]
    lasts = [max(place for of in places for place in of) for _, places in spans]
    assert counts.transcripts == len(toy.rows)
    assert counts.responses == sum(len(places) for _, places in spans)
    assert counts.scored_responses == sum(bool(of) for _, places in spans for of in places) < counts.responses
    assert counts.tokens == sum(last + 1 for last in lasts)
    prefixes = {  # shared within a study
        (row["study"], *ids[: k + 1])
        for row, (ids, _), last in zip(toy.rows, spans, lasts, strict=True)
        for k in range(last)
    }
    assert counts.computed_tokens == (len(prefixes) if min_share == 1 else sum(lasts))
    assert counts.rejects == counts.over_length_transcripts == counts.dropped_responses == 0


def test_hashes_tell_models_and_data_apart(toy: Toy, toy_run: Run, tmp_path: Path) -> None:
    other = shutil.copytree(toy.model, tmp_path / "model")
    make_model(other, seed=1, vocab_size=512, **CONFIGS["qwen3"])
    data = write_rows(tmp_path / "data.jsonl", toy.rows[:1])
    manifest = score(other, data, tmp_path / "run").manifest
    assert manifest.model_hash != toy_run.manifest.model_hash
    assert manifest.tokenizer_hash == toy_run.manifest.tokenizer_hash
    assert manifest.data[0].hash != toy_run.manifest.data[0].hash


def test_the_summary_is_the_mean_over_studies_of_the_records(toy_run: Run) -> None:
    table = psykern.read_run(toy_run.folder).to_pylist()
    summary = json.loads((toy_run.folder / "summary.json").read_text())
    assert summary == toy_run.summary.to_json() | {"studies": summary["studies"]}
    means = []
    for study in summary["studies"]:
        own = [r for r in table if r["study"] == study["study"]]
        scored = [r for r in own if r["logprob"] is not None]
        assert (study["responses"], study["scored"]) == (len(own), len(scored))
        means.append(-math.fsum(r["logprob"] for r in scored) / len(scored))
        assert study["mean_nll"] == pytest.approx(means[-1])
        assert study["accuracy"] == pytest.approx(sum(r["is_argmax"] for r in scored) / len(scored))
    assert [study["study"] for study in summary["studies"]] == ["bandit", "ratings", "words"]
    assert summary["mean_nll"] == pytest.approx(math.fsum(means) / 3)


def test_tokens_depend_on_what_may_change_a_prompt() -> None:
    """The date, and the libraries that render and cut texts: a later version's tokens may be others."""
    versions = {"transformers": "5.0", "tokenizers": "0.22", "torch": "2.9"}
    first = tokens_depend_on(recipe(versions=versions))
    assert first == tokens_depend_on(recipe(versions=versions | {"torch": "2.10"}, backend="cpu"))
    for change in ({"transformers": "5.1"}, {"tokenizers": "0.23"}):
        assert tokens_depend_on(recipe(versions=versions | change)) != first
    assert tokens_depend_on(recipe(versions=versions, date="2026-11-30")) != first
