"""Encoded units, planned: what runs and scoring in memory have in common.

    EncodedUnit ─ fit ─ plan ─► PlannedUnit ─ Engine.pairs ─► TargetScores

Transcripts go through in units: some of one study, planned together so that they share prefixes (``data.units``).
Memory is bounded by the unit, not by the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from psykern.core.clock import Clock
from psykern.core.settings import Settings
from psykern.core.types import EncodedTranscript, EncodedUnit
from psykern.data.context import fit
from psykern.engine.budgets import Budgets
from psykern.engine.plan import Plan, plan
from psykern.kernels.compute import Compute

# Tokens of a unit. What a stop loses and a machine takes at a time is one unit; what shares prefixes is of one unit.
_UNIT_TOKENS = {"cpu": 2**17, "cuda": 2**21}

# Of a unit that begins, its characters, responses and tokens; what it gives takes the share of it that is done.
Begin = Callable[[int, int, int], Callable[[float], None]]


def unseen(characters: int, responses: int, tokens: int) -> Callable[[float], None]:
    """Nobody looks at the progress."""
    del characters, responses, tokens
    return lambda share: None


@dataclass(frozen=True, slots=True, eq=False)
class PlannedUnit:
    """A unit that is ready to be computed."""

    unit: EncodedUnit
    transcripts: list[EncodedTranscript]  # those of the unit that fit the model's context, cut to it
    plan: Plan
    progress: Callable[[float], None]  # takes the share that is done


def planned(
    units: Iterable[EncodedUnit],
    settings: Settings,
    max_positions: int | None,
    budgets: Budgets,
    *,
    begin: Begin = unseen,
    clock: Clock | None = None,
) -> Iterator[PlannedUnit]:
    """The units, each cut to a context of ``max_positions`` tokens and planned. ``clock`` counts the phase "plan"."""
    clock = clock or Clock()
    for unit in units:
        with clock("plan"):
            fitting = (fit(t, settings.over_length, max_positions) for t in unit.transcripts)
            transcripts = [transcript for transcript in fitting if transcript is not None]
            of = plan(
                transcripts,
                wave_tokens=budgets.wave_tokens,
                batch_tokens=budgets.batch_tokens,
                carried_price=budgets.carried_price,
                min_share=settings.min_share,
            )
        yield PlannedUnit(unit, transcripts, of, begin(unit.info.characters, of.num_responses, of.num_tokens))


def with_unit_tokens(settings: Settings, compute: Compute) -> Settings:
    """``settings`` with the unit's size, where they name none, that suits the device."""
    return replace(settings, unit_tokens=settings.unit_tokens or _UNIT_TOKENS[compute.device.type])
