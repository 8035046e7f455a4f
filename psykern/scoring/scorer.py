"""A model and its tokenizer, loaded once and used as often as wanted."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar, overload

import pyarrow as pa

from psykern.core.clock import Clock
from psykern.core.errors import CheckpointError
from psykern.core.settings import Backend, Device, Dtype, Settings
from psykern.data.chat import ChatTemplate
from psykern.data.encode import Encoder
from psykern.data.pretrained import Pretrained
from psykern.data.tokenizer import Tokenizer
from psykern.engine.budgets import Budgets, budgets
from psykern.engine.engine import Engine
from psykern.engine.plan import plan, scores_of_each
from psykern.kernels.compute import Compute
from psykern.models.checkpoint import at_revision, hash_model, resolve_model
from psykern.models.families import read_spec
from psykern.models.model import Model
from psykern.models.spec import ModelSpec
from psykern.scoring.question import Question
from psykern.scoring.records import to_score
from psykern.scoring.results import Reject

A = TypeVar("A")


@dataclass(frozen=True, eq=False)
class Language:
    """What of a model folder makes tokens of a text; it needs no weights."""

    folder: Path
    pretrained: Pretrained
    tokenizer: Tokenizer
    beyond: int | None  # token ids from here on have no row in the model's embedding; None: all have

    @classmethod
    def load(cls, folder: Path, vocab_size: int) -> Language:
        """``vocab_size``: rows of the model's embedding.

        Raises CheckpointError where something is missing, or no text can be encoded for such a model.
        """
        pretrained = Pretrained.load(folder)
        tokenizer = Tokenizer.load(folder, pretrained)
        around = max((*tokenizer.front, *tokenizer.back), default=0)
        if around >= vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer puts token {around:,} around every text and the embedding has {vocab_size:,} "
                "rows; they are not of one model"
            )
        return cls(folder, pretrained, tokenizer, vocab_size if tokenizer.size > vocab_size else None)

    @cached_property
    def chat(self) -> ChatTemplate:
        """Raises CheckpointError where the folder has none."""
        return ChatTemplate.load(self.folder, self.pretrained)

    def encoder(self, settings: Settings) -> Encoder:
        """Encodes transcripts as ``settings`` say. Raises CheckpointError for a chat template that cannot be used."""
        chat = self.chat.at(settings.date) if settings.condition == "chat" else None
        return Encoder(self.tokenizer, settings, chat, beyond=self.beyond)


@dataclass(frozen=True, eq=False)
class Scorer:
    """A loaded model. Made by :func:`load`; ``engine`` is all that computes, so another one can stand in for it."""

    name: str  # as the user gave it, with the revision
    folder: Path
    model: Model
    language: Language
    engine: Engine
    budgets: Budgets  # that suit the device, as it was when the model had been loaded and nothing else

    @cached_property
    def hash(self) -> str:
        """``sha256:…`` of config and weights, which are read for it."""
        return hash_model(self.folder)

    @overload
    def score(
        self,
        rows: object,
        settings: Settings | None = None,
        *,
        stream: Literal[False] = False,
        rejects: list[Reject] | None = None,
        study: str = "rows",
    ) -> pa.Table: ...
    @overload
    def score(
        self,
        rows: object,
        settings: Settings | None = None,
        *,
        stream: Literal[True],
        rejects: list[Reject] | None = None,
        study: str = "rows",
    ) -> Generator[pa.RecordBatch, None, None]: ...
    def score(
        self,
        rows: object,
        settings: Settings | None = None,
        *,
        stream: bool = False,
        rejects: list[Reject] | None = None,
        study: str = "rows",
    ) -> pa.Table | Generator[pa.RecordBatch, None, None]:
        """The records of transcripts in memory, as :func:`psykern.score` writes those of files: a row per response.

        rows: dicts with the fields that a row of data has, or texts, in any iterable; a pandas or polars frame, an
        Arrow table, batch or reader, whatever else gives an Arrow stream, a ``datasets.Dataset``. They are read in a
        thread. settings: as of a run; a device, dtype or backend in them must be the loaded model's. study: of rows
        that do not name theirs. A row without participant is a person of its own, ``row:<index>``.

        Gives a table with the columns of a run's records; log-probabilities in nats. ``stream``: an iterator of record
        batches instead, in the memory of one unit (``settings.unit_tokens``); closing it stops the work. To
        ``rejects`` each row that cannot be used is added, index (from 0) and reason; without it a
        :class:`RejectedRowsWarning` says how many there were.

        Raises TypeError for what holds no rows, or one row alone; ValueError for a table without a column ``text``, for
        settings that contradict the model, and for a stream of rows that can be read once with
        ``options="observed-experiment"``, which reads them twice. While it scores: RowError for the first row that
        cannot be used where ``settings.strict``, DataError where one of ``settings.studies`` is not there,
        PsykernError for a transcript that is longer than the model's context where ``settings.over_length`` is "error",
        OutOfMemoryError, NonFiniteError.
        """
        records = to_score(self, rows, settings, study, stream=stream)
        return records.batches(rejects) if stream else records.table(rejects)

    def ask(self, question: Question[A]) -> A:
        """Computes what ``question`` needs, all of it in one plan, and answers it."""
        planned = plan(
            question.trees,
            wave_tokens=self.budgets.wave_tokens,
            batch_tokens=self.budgets.batch_tokens,
            wanted=question.wanted,
        )
        return question.answer(list(scores_of_each(question.trees, self.engine.run(planned))))


def check_model(model: object) -> None:
    """Raises TypeError for what is no name of a model, and no model that is loaded."""
    if not isinstance(model, (str, Path, Scorer)):
        raise TypeError(
            f"model: expected a folder or a hub id, got {type(model).__name__}; save the model and its tokenizer to a "
            "folder (save_pretrained of transformers does) and give that"
        )


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    wave_tokens: int | None = None,
    batch_tokens: int | None = None,
    chat: bool = False,
    clock: Clock | None = None,
) -> Scorer:
    """A checkpoint, loaded to score whatever it is given, as often as wanted.

    model: a folder or a hub id; ``revision``: a branch, tag or commit of the latter, as ``owner/name@REVISION`` says
    too. device: ``auto``, ``cpu``, ``cuda`` or one of several, ``cuda:1``. dtype: of the arithmetic, ``float32``,
    ``bfloat16`` or ``float16``; ``auto``: float32 on a CPU, bfloat16 on a GPU. backend: of the kernels.
    ``wave_tokens``, ``batch_tokens``: memory against speed, as in :class:`.Settings`. ``chat``: a chat template will be
    needed, so say at once if there is none.

    Raises CheckpointError for a folder that cannot be used, BackendError for a device or backend that is not there,
    ValueError for a word that is none of these, TypeError for what is no name of a model.
    """
    check_model(model)
    if isinstance(model, Scorer):
        raise TypeError(f"model: {model.name} is loaded; use it as it is")
    settings = Settings(device=device, dtype=dtype, backend=backend, wave_tokens=wave_tokens, batch_tokens=batch_tokens)
    compute = Compute.resolve(settings.device, settings.dtype, settings.backend)
    model, clock = at_revision(model, revision), clock or Clock()
    with clock("load"):
        folder = resolve_model(model)
        language = Language.load(folder, read_spec(folder).vocab_size)
        if chat:
            language.chat  # noqa: B018
        decoder = Model(folder, compute)  # last, as it takes longest
        suitable = budgets(decoder.spec, compute.device, compute.dtype).under(settings)
    return Scorer(str(model), folder, decoder, language, Engine(decoder), suitable)


def load_language(
    model: str | Path, *, revision: str | None = None, clock: Clock | None = None
) -> tuple[ModelSpec, Language]:
    """What ``model`` is made of, but for its weights, which are not downloaded either."""
    with (clock or Clock())("load"):
        folder = resolve_model(model, weights=False, revision=revision)
        spec = read_spec(folder)
        return spec, Language.load(folder, spec.vocab_size)
