"""A model that scores whatever it is given in memory, for as many callers as there are."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload
from weakref import finalize

import pyarrow as pa
import torch

from psykern.core.errors import PsykernError
from psykern.core.settings import Boundary, Settings
from psykern.engine.budgets import Budgets
from psykern.engine.engine import Engine
from psykern.models.adapters import hash_adapter
from psykern.models.foreign.model import ForeignModel
from psykern.models.model import Model
from psykern.scoring.asking import Further, Whole
from psykern.scoring.choices import choose_question
from psykern.scoring.distributions import At, distributions_question
from psykern.scoring.language import Language
from psykern.scoring.logprobs import logprobs_question
from psykern.scoring.question import Question
from psykern.scoring.queue import Queue
from psykern.scoring.records import to_score
from psykern.scoring.results import Choice, Logprob, Reject, Surprisal, TokenLogprobs
from psykern.scoring.sequences import sequences_question
from psykern.scoring.session import Session
from psykern.scoring.surprisal import First, surprisal_question
from psykern.scoring.texts import Reader

A = TypeVar("A")


@dataclass(frozen=True, eq=False, repr=False)
class Scorer:
    """A loaded model. Made by :func:`load`; ``engine`` is all that computes, so another one can stand in for it.

    Threads and asyncio tasks may share one: what they ask at the same time is computed together. Used as a context
    manager it is closed at the end. In a fork of its process it is refused: load the model there.
    """

    name: str  # as the user gave it, with the revision; with an adapter "BASE + ADAPTER"
    folder: Path
    model: Model | ForeignModel
    language: Language
    engine: Engine
    budgets: Budgets  # that suit the device, as it was when the model had been loaded and nothing else
    adapter: Path | None  # that is merged into the folder's weights
    _queue: Queue = field(init=False)

    def __post_init__(self) -> None:
        queue = Queue(self.budgets.wave_tokens)
        object.__setattr__(self, "_queue", queue)
        finalize(self, queue.drop)  # also before the interpreter ends, which the thread must not outlive

    @cached_property
    def hash(self) -> str:
        """``sha256:…`` of config and weights, which are read for it, and of the adapter's."""
        base, adapter = self.model.base, self.adapter_hash
        return base.hash if adapter is None else base.hash_with(adapter)

    @cached_property
    def adapter_hash(self) -> str | None:
        """``sha256:…`` of the adapter's config and weights; None: there is none."""
        return None if self.adapter is None else hash_adapter(self.adapter)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files are: the adapter's folder where that holds one, else :attr:`folder`. For tools
        that tokenize for themselves."""
        return self.language.folder

    def close(self) -> None:
        """Gives the model's memory back. What is being computed ends first, what waits fails; every later use is
        refused. Records that somebody is reading end with the wave in hand and an error; a stream that is left open
        holds the model until then. May be called twice, and by several threads."""
        held = dict(self.__dict__)  # another thread may take it away
        if "_queue" not in held:
            return
        held["_queue"].close()
        is_device = held["model"].device.type == "cuda"
        for own in held.keys() - {"name"}:  # a frozen object's fields cannot be set
            self.__dict__.pop(own, None)
        del held
        gc.collect()
        if is_device:
            torch.cuda.empty_cache()

    def __repr__(self) -> str:
        return f"<Scorer of {self.name}{'' if '_queue' in self.__dict__ else ', closed'}>"

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    if not TYPE_CHECKING:

        def __getattr__(self, attribute: str) -> Any:
            """Only of what is not there: all but the name, when the scorer is closed."""
            if attribute in _FIELDS:
                raise PsykernError(f"the scorer of {self.name} is closed; load the model again")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {attribute!r}")

    @cached_property
    def _reader(self) -> Reader:
        return self.language.reader(self.model.spec)

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

    @overload
    def logprobs(  # type: ignore[overload-overlap]
        self,
        contexts: str,
        continuations: str,
        *,
        boundary: Boundary = ...,
        tokens: bool = ...,
        ranks: bool = ...,
        pmi_context: str | None = ...,
    ) -> Logprob: ...
    @overload
    def logprobs(  # type: ignore[overload-overlap]
        self,
        contexts: Sequence[str],
        continuations: Sequence[str],
        *,
        boundary: Boundary = ...,
        tokens: bool = ...,
        ranks: bool = ...,
        pmi_context: str | None = ...,
    ) -> list[Logprob]: ...
    @overload
    def logprobs(
        self,
        contexts: Sequence[str],
        continuations: Sequence[Sequence[str]],
        *,
        boundary: Boundary = ...,
        tokens: bool = ...,
        ranks: bool = ...,
        pmi_context: str | None = ...,
    ) -> list[list[Logprob]]: ...
    def logprobs(
        self,
        contexts: str | Sequence[str],
        continuations: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        boundary: Boundary = "joint",
        tokens: bool = False,
        ranks: bool = False,
        pmi_context: str | None = None,
    ) -> Any:
        """log P(continuation | context), in nats: the sum over the continuation's tokens.

        One context and one continuation give a :class:`.Logprob`; one context and a list, or n contexts and n
        continuations, a list of them; n contexts and n lists a list of lists. Nothing is added to a text but the
        special tokens that the tokenizer puts in front.

        ``boundary``: ``"joint"`` tokenizes context and continuation as one string, and all tokens that overlap the
        continuation are its own, also one that begins in the context (flag ``straddles``); ``"split"`` tokenizes the
        continuation alone, as evaluation harnesses do. ``tokens``: each token too, with ``ranks`` its rank.
        ``pmi_context``: a text such as ``"Answer:"`` after which the same continuations are scored, for
        :attr:`.Logprob.pmi`; ``""`` where the tokenizer puts a token in front.

        A continuation at the very begin of a text, without a special token in front, has NaN and the flag
        ``no_context``. Raises TypeError for what is no text, ValueError for lists of different lengths, an empty
        continuation or one without a token, and a text that the model cannot read.
        """
        return self._ask(
            logprobs_question(
                self._reader,
                contexts,
                continuations,
                boundary=boundary,
                tokens=tokens,
                ranks=ranks,
                pmi_context=pmi_context,
            )
        )

    @overload
    def choose(  # type: ignore[overload-overlap]
        self,
        contexts: str,
        options: Sequence[str],
        *,
        boundary: Boundary = ...,
        closing: str | None = ...,
    ) -> Choice: ...
    @overload
    def choose(
        self,
        contexts: Sequence[str],
        options: Sequence[str] | Sequence[Sequence[str]],
        *,
        boundary: Boundary = ...,
        closing: str | None = ...,
    ) -> list[Choice]: ...
    def choose(
        self,
        contexts: str | Sequence[str],
        options: Sequence[str] | Sequence[Sequence[str]],
        *,
        boundary: Boundary = "joint",
        closing: str | None = None,
    ) -> Any:
        """The log-softmax over answer options after a context, as a record has it.

        One context and its options give a :class:`.Choice`; n contexts with one list of options for all, or n lists, a
        list of them. ``boundary`` as of :meth:`logprobs`. ``closing``: what stands behind an option, such as ``"\\n"``;
        it is tokenized with it, and scored where one option's tokens begin another's (flag ``closing_mark``). None:
        ``">>"`` where the context ends inside a response (a ``<<`` without ``>>`` behind it), else nothing.

        Raises TypeError for what is no text, ValueError for lists of different lengths, options that are none, have no
        token, have the same tokens as another or are not told apart from one that they begin, and a text that the model
        cannot read.
        """
        return self._ask(choose_question(self._reader, contexts, options, boundary=boundary, closing=closing))

    @overload
    def surprisal(  # type: ignore[overload-overlap]
        self, texts: str, *, first: First = ..., start: str = ..., ranks: bool = ..., trailing_space: bool = ...
    ) -> Surprisal: ...
    @overload
    def surprisal(
        self,
        texts: Sequence[str],
        *,
        first: First = ...,
        start: str = ...,
        ranks: bool = ...,
        trailing_space: bool = ...,
    ) -> list[Surprisal]: ...
    def surprisal(
        self,
        texts: str | Sequence[str],
        *,
        first: First = "auto",
        start: str = "",
        ranks: bool = False,
        trailing_space: bool = False,
    ) -> Any:
        """-log P of every token and every word of a text given all before it, in nats; bits are properties.

        A text gives a :class:`.Surprisal`, a list of texts a list. A word is a run of characters other than white
        space; a token counts to the word in which its last such character stands.

        ``first``: ``"auto"`` reads the special tokens that the tokenizer puts in front; ``"bos"`` its bos_token, else
        its eos_token, else the bos_token_id of config.json, also where it puts none; ``"null"`` none: the first token
        has NaN. ``start``: a text in front that is read and not reported. ``ranks``: of every token, 1: none is
        likelier. ``trailing_space``: words are corrected for the white space that the tokens of the word behind them
        begin with: with B(c) the probability that the next token begins with white space or is a special one, the
        surprisal of a word w gains log B(text before w) and loses log B(text with w); :mod:`psykern.scoring.surprisal`
        says of which words.

        Raises TypeError for what is no text, ValueError for ``"bos"`` without such a token, ``trailing_space`` with a
        tokenizer whose words do not begin with a space, and a text that the model cannot read.
        """
        return self._ask(
            surprisal_question(
                self._reader, texts, first=first, start=start, ranks=ranks, trailing_space=trailing_space
            )
        )

    def distributions(
        self,
        contexts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        token_ids: Sequence[int] | None = None,
        top_k: int | None = None,
        at: At = "end",
    ) -> Any:
        """log P of the next token, in nats: [n, V] float32 of all V rows of the model's vocabulary behind n contexts.

        With ``token_ids`` of these K tokens alone, [n, K] float32; with ``top_k`` the likeliest, as :class:`.TopTokens`
        of [n, K] arrays. One text gives arrays without the first axis. Contexts may be lists of token ids, too, taken
        as they are. ``at``: ``"end"`` of a context; a list of P numbers of tokens, special ones in front included,
        behind which to ask: [n, P, …]; ``"all"``, behind every token: a list with an array [T, …] for each context.

        Raises TypeError for what is no text or no token id, ValueError for tokens that the model does not have, places
        that a context does not have, a context without a token, and a text that the model cannot read.
        """
        return self._ask(distributions_question(self._reader, contexts, token_ids=token_ids, top_k=top_k, at=at))

    @overload
    def token_logprobs(
        self, sequences: Sequence[int], starts: int = ..., *, ranks: bool = ..., mass: Sequence[int] | None = ...
    ) -> TokenLogprobs: ...
    @overload
    def token_logprobs(
        self,
        sequences: Sequence[Sequence[int]],
        starts: int | Sequence[int] = ...,
        *,
        ranks: bool = ...,
        mass: Sequence[int] | None = ...,
    ) -> list[TokenLogprobs]: ...
    def token_logprobs(
        self,
        sequences: Sequence[int] | Sequence[Sequence[int]],
        starts: int | Sequence[int] = 1,
        *,
        ranks: bool = False,
        mass: Sequence[int] | None = None,
    ) -> Any:
        """log P of the tokens of sequences of token ids, each given all before it, in nats: for tools that tokenize for
        themselves. Sequences are taken as they are, and what they begin with alike is computed once.

        A list of token ids gives a :class:`.TokenLogprobs`, a list of lists (or of arrays) a list. ``starts``: number
        of the first token to score of all, or of each; at least 1, as before the first token of all stands nothing. As
        many as the sequence has tokens: none is scored. ``ranks``: of every token, 1: none is likelier. ``mass``: ids
        of tokens whose probability together is wanted too, at each place.

        Raises TypeError for what are no token ids, ValueError for tokens that the model does not have, a sequence that
        is longer than its context, and starts that a sequence does not have.
        """
        return self._ask(sequences_question(self._reader, sequences, starts, ranks=ranks, mass=mass))

    def session(self, text: str = "") -> Session:
        """A text that will grow, trial by trial: what is computed of it is kept, so that each step costs what is new.

        Keys and values of all sessions are kept in ``session_bytes`` of memory (see :func:`load`); what was not used
        for longest is given up, and computed again when it is asked for: answers are the same, but sessions that take
        turns and do not all fit are computed anew at each. Those that begin alike, as forks do, share.

        Raises what :meth:`.Session.append` raises.
        """
        session = Session(self, self._reader, self._reader.contexts([""])[0])
        session.append(text)
        return session

    async def alogprobs(
        self,
        contexts: str | Sequence[str],
        continuations: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        boundary: Boundary = "joint",
        tokens: bool = False,
        ranks: bool = False,
        pmi_context: str | None = None,
    ) -> Any:
        """:meth:`logprobs` for asyncio tasks: what many of them ask at the same time is computed together. A task that
        is cancelled while it waits costs nothing; where all that are computed together are, that ends with the wave in
        hand. So it is with the other siblings."""
        question = await asyncio.to_thread(
            logprobs_question,
            self._reader,
            contexts,
            continuations,
            boundary=boundary,
            tokens=tokens,
            ranks=ranks,
            pmi_context=pmi_context,
        )
        return await self._aask(question)

    async def achoose(
        self,
        contexts: str | Sequence[str],
        options: Sequence[str] | Sequence[Sequence[str]],
        *,
        boundary: Boundary = "joint",
        closing: str | None = None,
    ) -> Any:
        """:meth:`choose` for asyncio tasks."""
        question = await asyncio.to_thread(
            choose_question, self._reader, contexts, options, boundary=boundary, closing=closing
        )
        return await self._aask(question)

    async def asurprisal(
        self,
        texts: str | Sequence[str],
        *,
        first: First = "auto",
        start: str = "",
        ranks: bool = False,
        trailing_space: bool = False,
    ) -> Any:
        """:meth:`surprisal` for asyncio tasks."""
        question = await asyncio.to_thread(
            surprisal_question,
            self._reader,
            texts,
            first=first,
            start=start,
            ranks=ranks,
            trailing_space=trailing_space,
        )
        return await self._aask(question)

    async def adistributions(
        self,
        contexts: str | Sequence[str],
        *,
        token_ids: Sequence[int] | None = None,
        top_k: int | None = None,
        at: At = "end",
    ) -> Any:
        """:meth:`distributions` for asyncio tasks."""
        question = await asyncio.to_thread(
            distributions_question, self._reader, contexts, token_ids=token_ids, top_k=top_k, at=at
        )
        return await self._aask(question)

    def _ask(self, question: Question[A], kind: type[Whole | Further] = Whole) -> A:
        """Computes what ``question`` needs, together with what others ask at the same time, and answers it."""
        how = kind(self.engine, self.budgets, question.wanted)
        return question.answer(self._queue.result(how, question.trees, kind.tokens(question)))

    async def atoken_logprobs(
        self,
        sequences: Sequence[int] | Sequence[Sequence[int]],
        starts: int | Sequence[int] = 1,
        *,
        ranks: bool = False,
        mass: Sequence[int] | None = None,
    ) -> Any:
        """:meth:`token_logprobs` for asyncio tasks."""
        question = await asyncio.to_thread(sequences_question, self._reader, sequences, starts, ranks=ranks, mass=mass)
        return await self._aask(question)

    async def _aask(self, question: Question[A], kind: type[Whole | Further] = Whole) -> A:
        """:meth:`_ask` for asyncio tasks."""
        how = kind(self.engine, self.budgets, question.wanted)
        return question.answer(await self._queue.wait(how, question.trees, kind.tokens(question)))


_FIELDS = frozenset(of.name for of in fields(Scorer))
