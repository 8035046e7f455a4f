"""Which runs are compared with which, and a refusal with the reason where that would mean nothing.

Two kinds of pair: a model and its base under the same condition, and a model under another condition than plain with
itself in plain text. Pairs follow the table of models (``models.py``) or a file with the columns ``base``,
``post`` and, if wished, ``kind``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from psykern.core.errors import ComparisonError
from psykern.core.hub import split_revision
from psykern.study.finished import FinishedRun, Responses
from psykern.study.models import BASE, StudyModel, find_model, model_name


@dataclass(frozen=True, slots=True)
class NamedRun:
    """A run with what is known of its model."""

    label: str  # unique among the runs compared: the model's name, with the condition unless it is plain
    run: FinishedRun
    model: StudyModel


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs over the same responses."""

    base: NamedRun
    post: NamedRun
    kind: str  # of post-training; for a pair of conditions the second one's name

    @property
    def same_model(self) -> bool:
        """Whether the two differ in their condition alone."""
        return self.base.run.condition != self.post.run.condition


def name_runs(runs: Sequence[FinishedRun], described: Mapping[str, StudyModel]) -> list[NamedRun]:
    """Each run with its label and model; a model that nobody describes is its own family, of kind "other"."""
    named = []
    labels: list[str] = []
    for run in runs:
        name = model_name(run.model_id)
        found = find_model(run.model_id, dict(described))
        model = found or StudyModel(name, name, name, None, "other", None)
        label = model.name if run.condition == "plain" else f"{model.name} ({run.condition})"
        labels.append(label)
        named.append((label, run, model))
    return [
        NamedRun(label if labels.count(label) == 1 else f"{label} [{run.path}]", run, model)
        for label, run, model in named
    ]


def check_alike(runs: Sequence[NamedRun]) -> None:
    """Refuse runs of other data or settings than the first one's. Raises ComparisonError with what differs."""
    first = runs[0]
    for other in runs[1:]:
        if other.run.data != first.run.data:
            raise ComparisonError(
                f"data: {other.label} was scored on other files than {first.label}: "
                f"{_difference(first.run.data, other.run.data)}"
            )
        for (name, one), (_, two) in zip(first.run.settings, other.run.settings, strict=True):
            if one != two:
                raise ComparisonError(f"{name}: {first.label} has {one}, {other.label} has {two}")


def _difference(one: Sequence[str], two: Sequence[str]) -> str:
    only = [sorted(set(a) - set(b)) for a, b in ((one, two), (two, one))]
    shown = [
        f"{len(hashes)} of the {whose}'s hashes are not among the other's ({hashes[0][:16]}…)"
        for hashes, whose in zip(only, ("latter", "former"), strict=True)
        if hashes
    ]
    return "; ".join(shown) or f"{len(two)} files against {len(one)}"


def find_pairs(runs: Sequence[NamedRun]) -> list[Pair]:
    """Pairs by the table of models: base and post-trained under one condition, plain and other condition of one."""
    pairs = []
    by_key = {(named.model.name.lower(), named.run.condition): named for named in runs}
    if len(by_key) < len(runs):
        seen: dict[tuple[str, str], NamedRun] = {}
        for named in runs:
            key = (named.model.name.lower(), named.run.condition)
            if key in seen:
                raise ComparisonError(
                    f"runs: {seen[key].run.path} and {named.run.path} are both {named.model.name} in condition "
                    f"{named.run.condition}; give one of them, or say what is compared in a pairs file"
                )
            seen[key] = named
    for named in runs:
        base = by_key.get(((named.model.base or "").lower(), named.run.condition))
        if base is not None:
            pairs.append(Pair(base, named, named.model.kind))
        plain = by_key.get((named.model.name.lower(), "plain"))
        if plain is not None and named.run.condition != "plain":
            _check_one_revision(plain, named)
            pairs.append(Pair(plain, named, named.run.condition))
    return pairs


def _check_one_revision(plain: NamedRun, other: NamedRun) -> None:
    """Raises ComparisonError where two conditions of a model are of other weights."""
    ids = plain.run.model_id, other.run.model_id
    if plain.run.model_hash != other.run.model_hash and split_revision(ids[0])[1] != split_revision(ids[1])[1]:
        raise ComparisonError(
            f"{other.run.path}: {other.label} is of {ids[1]} and its plain run of {ids[0]}: expected one revision"
        )


def read_pairs(path: Path, runs: Sequence[NamedRun]) -> list[Pair]:
    """Pairs from a CSV file with the columns base, post and optionally kind.

    A run is named by its folder, its label, its model id or that id's last part. Pairs of one model under two
    conditions are added as in :func:`find_pairs`. Raises ComparisonError, naming file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ComparisonError(f"{path}: cannot be read: {error}") from error
    if not rows or not {"base", "post"} <= set(rows[0]):
        raise ComparisonError(f"{path}: expected the columns base, post and optionally kind, and at least one row")
    pairs = []
    for line, row in enumerate(rows, 2):
        base, post = (_named(f"{path}:{line}: {column}", row[column] or "", runs) for column in ("base", "post"))
        if base is post:
            raise ComparisonError(f"{path}:{line}: base and post are the same run, {base.label}")
        if base.run.condition != post.run.condition:
            raise ComparisonError(
                f"{path}:{line}: condition: {base.label} has {base.run.condition}, {post.label} has "
                f"{post.run.condition}"
            )
        kind = (row.get("kind") or "").strip() or post.model.kind
        pairs.append(Pair(base, post, "other" if kind == BASE else kind))
    return pairs + [pair for pair in find_pairs(runs) if pair.same_model]


def _named(where: str, name: str, runs: Sequence[NamedRun]) -> NamedRun:
    name = name.strip()
    for names in (
        lambda r: {str(r.run.path), str(r.run.path.resolve()), r.label},
        lambda r: {r.run.path.name, r.run.model_id, r.model.name},
    ):
        found = [named for named in runs if name and name in names(named)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ComparisonError(f"{where}: {name!r} could be any of {', '.join(str(r.run.path) for r in found)}")
    raise ComparisonError(f"{where}: expected one of the runs ({', '.join(r.label for r in runs)}), got {name!r}")


def check_partners(runs: Sequence[NamedRun], pairs: Sequence[Pair]) -> None:
    """Refuse a run that is in no pair. Raises ComparisonError that says which partner it lacks."""
    paired = {id(named) for pair in pairs for named in (pair.base, pair.post)}
    alone = [named for named in runs if id(named) not in paired]
    if not alone:
        return
    named = alone[0]
    if named.model.base is not None:
        lacks = f"its base {named.model.base} (condition {named.run.condition})"
        if named.run.condition != "plain":
            lacks += " and its own plain run"
        lacks += " is not among the runs" if named.run.condition == "plain" else " are not among the runs"
    elif named.model.kind == BASE:
        lacks = "no run of a model that was post-trained from it is given"
    else:
        lacks = "which base it was post-trained from is not known; describe it with --models, or give --pairs"
    more = f" ({len(alone) - 1} more runs are alone too)" if len(alone) > 1 else ""
    raise ComparisonError(
        f"{named.run.path}: {named.label} has no partner: {lacks}{more}; --unpaired lets such runs into the figures "
        "that need no pair"
    )


def check_rows(pair: Pair, base: Responses, post: Responses) -> None:
    """Refuse a pair whose responses are not the same ones. Raises ComparisonError with the first that differs.

    Under the protocol "exact" the texts must be equal too; under "study", and between conditions, what is read as a
    response depends on tokenizer and template.
    """
    names = pair.base.label, pair.post.label
    _check_order(pair)
    if base.participants != post.participants:
        sets = set(base.participants), set(post.participants)
        for here, there, lacking in ((0, 1, names[1]), (1, 0, names[0])):
            missing = sorted(sets[here] - sets[there])
            if missing:
                raise ComparisonError(
                    f"responses: {lacking} lacks {len(missing):,} of the {len(sets[here]):,} participants of "
                    f"{names[here]}; the first: {_who(missing[0])}"
                )
    counts = np.diff(base.participant_offsets), np.diff(post.participant_offsets)
    if not np.array_equal(*counts):
        others = np.flatnonzero(counts[0] != counts[1])
        first = int(others[0])
        raise ComparisonError(
            f"responses: {_who(base.participants[first])} has {counts[0][first]:,} responses in {names[0]} and "
            f"{counts[1][first]:,} in {names[1]}; the runs differ in {len(others):,} participants"
        )
    differing = base.response_index != post.response_index
    if differing.any():
        _refuse_response(base, int(np.flatnonzero(differing)[0]), "are numbered differently", names)
    exact = ("protocol", '"exact"') in pair.base.run.settings
    if exact and not pair.same_model and not np.array_equal(base.texts, post.texts):
        first = int(np.flatnonzero(base.texts != post.texts)[0])
        raise ComparisonError(
            f"responses: those of {_who(base.participants[first])} have other texts in {names[0]} than in {names[1]}"
        )


def _check_order(pair: Pair) -> None:
    """Raises ComparisonError where a participant's transcripts may stand in another order: files of a study are read in
    order of their names, and records do not tell which of them a transcript is from."""
    base, post = pair.base.run, pair.post.run
    shared = max(base.shared_participants, post.shared_participants)
    if shared and base.data_read != post.data_read:
        raise ComparisonError(
            f"data: {pair.post.label} read the files in another order than {pair.base.label}, as they had other names, "
            f"and {shared:,} participants are in several of them, so that their transcripts cannot be told apart; "
            "score one run anew with the other's file names"
        )


def _refuse_response(base: Responses, row: int, how: str, names: tuple[str, str]) -> None:
    participant = int(np.searchsorted(base.participant_offsets, row, side="right")) - 1
    raise ComparisonError(f"responses: those of {_who(base.participants[participant])} {how} in {' and '.join(names)}")


def _who(participant: tuple[str, str, str]) -> str:
    study, experiment, name = participant
    return f"{study}, experiment {experiment!r}, participant {name!r}"
