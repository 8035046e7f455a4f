"""Encoded transcripts with scores, and manifests, made by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from psykern.core.errors import Source
from psykern.core.types import EncodedTranscript, TargetScores
from psykern.runs.manifest import Counts, InputFile, Manifest, Outcome, Recipe, library_versions, peak_memory_bytes


def encoded(
    num_tokens: list[int],
    options: list[tuple[str, ...] | None] | None = None,
    option_index: list[int] | None = None,
    branch_tokens: list[int] | None = None,
    branch_scored_tok: list[int] | None = None,
    responses: list[str] | None = None,
    participant: str = "p1",
) -> EncodedTranscript:
    """A transcript whose responses have ``num_tokens`` scored tokens; token ids do not matter here."""
    count = len(num_tokens)
    options = options or [None] * count
    num_options = [len(o or ()) for o in options]
    branch_tokens = branch_tokens or [1] * sum(num_options)
    starts = 5 + 3 * np.arange(count)
    return EncodedTranscript(
        study="study",
        experiment="study/exp1",
        participant=participant,
        source=Source("data.jsonl", 1),
        token_ids=np.zeros(5 + 3 * count + sum(num_tokens), np.int32),
        responses=tuple(responses or [f"r{i}" for i in range(count)]),
        spans_tok=np.stack([starts, starts + num_tokens], axis=1).astype(np.int32),
        flags=tuple("empty" if n == 0 else None for n in num_tokens),
        options=tuple(options),
        option_index=np.array(option_index or [-1] * count, np.int32),
        branch_response=np.repeat(np.arange(count), num_options).astype(np.int32),
        branch_parent_tok=np.repeat(starts, num_options).astype(np.int32),
        branch_scored_tok=np.array(branch_scored_tok or [0] * len(branch_tokens), np.int32),
        branch_offsets=np.concatenate([[0], np.cumsum(branch_tokens)]).astype(np.int64),
        branch_token_ids=np.zeros(sum(branch_tokens), np.int32),
        num_dropped=0,
    )


def target_scores(logprob: list[float], is_argmax: list[bool] | None = None) -> TargetScores:
    """Scores whose entropies are 0.5, 1.5, 2.5, …"""
    count = len(logprob)
    return TargetScores(
        logprob=np.array(logprob, np.float32),
        is_argmax=np.array(is_argmax if is_argmax is not None else [True] * count, bool),
        entropy=np.arange(count, dtype=np.float32) + 0.5,
    )


def random_transcripts(rng: np.random.Generator, count: int) -> tuple[list[EncodedTranscript], TargetScores]:
    """Transcripts with empty responses, no responses, no options, and branches whose first tokens are not scored."""
    transcripts = []
    for i in range(count):
        num_tokens = rng.integers(0, 4, rng.integers(0, 6)).tolist()
        options = [
            tuple(f"o{k}" for k in range(n)) if (n := int(rng.integers(0, 4))) else None for _ in range(len(num_tokens))
        ]
        num_branches = sum(len(o or ()) for o in options)
        unscored = rng.integers(0, 3, num_branches)
        transcripts.append(
            encoded(
                num_tokens,
                options,
                option_index=[int(rng.integers(-1, len(o or ()))) for o in options],
                branch_tokens=(unscored + rng.integers(1, 4, num_branches)).tolist(),
                branch_scored_tok=unscored.tolist(),
                participant=f"p{i}",
            )
        )
    targets = sum(int(np.diff(t.spans_tok).sum()) for t in transcripts)
    targets += sum(int((np.diff(t.branch_offsets) - t.branch_scored_tok).sum()) for t in transcripts)
    return transcripts, target_scores((-5 * rng.random(targets)).tolist(), (rng.random(targets) < 0.7).tolist())


def recipe(**changes: Any) -> Recipe:
    made = Recipe(
        model_id="tiny",
        adapter=None,
        model_hash="a1",
        weights=None,
        tokenizer_hash="b2",
        beyond_embedding=None,
        data=(InputFile("data.jsonl", "c3", 10),),
        protocol="exact",
        condition="plain",
        discrete=None,
        chat_template_hash=None,
        date=None,
        boundary="joint",
        marks="keep",
        options="given",
        max_options=26,
        over_length="error",
        limit=None,
        studies=("study",),
        same_participants="merge",
        versions=library_versions("0.1.0"),
        device="cpu",
        dtype="float32",
        implementation="native",
        backend="reference",
        arithmetic=None,
        company_free=False,
        wave_tokens=4096,
        batch_tokens=256,
        min_share=32,
        unit_tokens=1000,
        started="2026-01-01T00:00:00+00:00",
    )
    return dataclasses.replace(made, **changes)


def manifest(**outcome: Any) -> Manifest:
    """Of a run that is finished."""
    made = Outcome(
        counts=Counts(1, 2, 2, 30, 20, 0, 0, 0),
        seconds={"read": 0.5, "run": 2.0},
        tokens_per_second=15.0,
        responses_per_second=1.0,
        peak_memory_bytes=peak_memory_bytes(),
        peak_device_bytes=None,
        gpu_idle_share=None,
        finished="2026-01-01T00:00:02+00:00",
    )
    return Manifest.of(recipe(), dataclasses.replace(made, **outcome))
