"""A text that grows, trial by trial, and what may follow it: a participant in a closed loop.

A session is its text and its tokens. Keys and values of what was computed are the engine's, which finds them by the
tokens: so forks share them without being told, as do sessions that begin alike, and one that went back. Nothing is
computed before it is asked for, and nothing that is asked depends on what was computed before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from psykern.core.types import TokenTree
from psykern.data.continuations import Boundary, Context, extended
from psykern.scoring.asking import Further
from psykern.scoring.choices import choose_question
from psykern.scoring.logprobs import logprobs_question
from psykern.scoring.question import Question
from psykern.scoring.results import Choice, Logprob
from psykern.scoring.texts import Reader, many, one_text

if TYPE_CHECKING:
    from psykern.scoring.scorer import Scorer


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """A place in a session's text, to come back to. Made by :meth:`Session.mark`."""

    session: Session
    context: Context


class Session:
    """A text that grows. Made by :meth:`.Scorer.session`.

    Sessions of one Scorer may be used from several threads, one session from one thread at a time; :func:`step` takes
    many sessions on together, which is much faster than one after the other.
    """

    def __init__(self, scorer: Scorer, reader: Reader, context: Context) -> None:
        """Not to be called: see :meth:`.Scorer.session`."""
        self.scorer = scorer
        self._reader = reader
        self._context = context

    @property
    def text(self) -> str:
        """So far."""
        return self._context.text

    @property
    def num_tokens(self) -> int:
        """Of the text, with the special tokens that the tokenizer puts in front."""
        return len(self._context.tokens.ids)

    def __len__(self) -> int:
        """:attr:`num_tokens`."""
        return self.num_tokens

    def __repr__(self) -> str:
        end = self.text if len(self.text) <= 40 else f"…{self.text[-40:]}"
        return f"<Session of {self.num_tokens:,} tokens, {end!r}>"

    def append(self, text: str) -> None:
        """Puts ``text`` behind the session's; computes nothing.

        Raises TypeError where it is no str, ValueError where the model cannot read what it comes to, because that is
        longer than its context or has tokens that it does not know; then nothing is appended.
        """
        self._context = _appended("text", self, text)

    def choose(self, options: Sequence[str], *, closing: str | None = None, boundary: Boundary = "joint") -> Choice:
        """The log-softmax over ``options`` behind the text; arguments, answer and errors as of :meth:`.Scorer.choose`.
        Nothing is appended: that is to be said with :meth:`append`."""
        choice: Choice = self.scorer._ask(self._choosing(options, closing, boundary), Further)
        return choice

    async def achoose(
        self, options: Sequence[str], *, closing: str | None = None, boundary: Boundary = "joint"
    ) -> Choice:
        """:meth:`choose` for asyncio tasks: those that wait at the same time, each with a session of its own, are taken
        on together."""
        choice: Choice = await self.scorer._aask(self._choosing(options, closing, boundary), Further)
        return choice

    def logprobs(
        self, continuations: Sequence[str], *, boundary: Boundary = "joint", tokens: bool = False
    ) -> list[Logprob]:
        """log P of each of ``continuations`` behind the text, in nats; arguments, answer and errors as of
        :meth:`.Scorer.logprobs`."""
        every: list[Logprob] = self.scorer._ask(self._scoring(continuations, boundary, tokens), Further)
        return every

    async def alogprobs(
        self, continuations: Sequence[str], *, boundary: Boundary = "joint", tokens: bool = False
    ) -> list[Logprob]:
        """:meth:`logprobs` for asyncio tasks, as :meth:`achoose`."""
        every: list[Logprob] = await self.scorer._aask(self._scoring(continuations, boundary, tokens), Further)
        return every

    def _choosing(self, options: Sequence[str], closing: str | None, boundary: Boundary) -> Question[Any]:
        reader = self._reader.knowing([self._context])
        return choose_question(reader, self.text, options, closing=closing, boundary=boundary)

    def _scoring(self, continuations: Sequence[str], boundary: Boundary, tokens: bool) -> Question[Any]:
        if isinstance(continuations, str):
            continuations = [continuations]
        reader = self._reader.knowing([self._context])
        return logprobs_question(reader, self.text, continuations, boundary=boundary, tokens=tokens)

    def fork(self) -> Session:
        """Another session with the same text so far. Costs nothing: what is computed for one is there for both."""
        return Session(self.scorer, self._reader, self._context)

    def mark(self) -> Mark:
        """The text as it is now, for :meth:`reset`."""
        return Mark(self, self._context)

    def reset(self, mark: Mark) -> None:
        """Takes back all that was appended since ``mark``.

        Raises TypeError for what is no mark, ValueError for one of another session, or of a text that the session's
        does not begin with any more.
        """
        if not isinstance(mark, Mark):
            raise TypeError(f"mark: expected what Session.mark gives, got {type(mark).__name__}")
        if mark.session is not self:
            raise ValueError("mark: it is of another session; a fork needs marks of its own")
        if not self.text.startswith(mark.context.text):
            raise ValueError(
                "mark: the session was reset to a text before it, and does not begin with the marked text any more; "
                "keep a fork to come back to it"
            )
        self._context = mark.context


@overload
def step(
    sessions: Sequence[Session],
    texts: str | Sequence[str] | None = ...,
    *,
    options: None = ...,
    closing: str | None = ...,
    boundary: Boundary = ...,
) -> None: ...
@overload
def step(
    sessions: Sequence[Session],
    texts: str | Sequence[str] | None = ...,
    *,
    options: Sequence[str] | Sequence[Sequence[str]],
    closing: str | None = ...,
    boundary: Boundary = ...,
) -> list[Choice]: ...
def step(
    sessions: Sequence[Session],
    texts: str | Sequence[str] | None = None,
    *,
    options: Sequence[str] | Sequence[Sequence[str]] | None = None,
    closing: str | None = None,
    boundary: Boundary = "joint",
) -> list[Choice] | None:
    """Takes n ``sessions`` on together: appends ``texts`` (n of them, or one for all) and gives each one's choice among
    ``options`` (one list for all, or n lists), as :meth:`Session.choose` does. Without options what was appended is
    computed, so that what is asked next is answered sooner.

    Raises what :meth:`Session.append` and :meth:`Session.choose` raise, TypeError for what is no list of sessions, and
    ValueError for a session that is there twice, sessions of several Scorers, or lists of another length. Where
    anything fails nothing is appended to any session.
    """
    taken = _Step.of(sessions, texts, options, closing, boundary)
    if taken.scorer is None:
        return None if options is None else []
    return taken.done(taken.scorer._ask(taken.question, Further))


async def astep(
    sessions: Sequence[Session],
    texts: str | Sequence[str] | None = None,
    *,
    options: Sequence[str] | Sequence[Sequence[str]] | None = None,
    closing: str | None = None,
    boundary: Boundary = "joint",
) -> list[Choice] | None:
    """:func:`step` for asyncio tasks: those that wait at the same time are taken on together."""
    taken = _Step.of(sessions, texts, options, closing, boundary)
    if taken.scorer is None:
        return None if options is None else []
    return taken.done(await taken.scorer._aask(taken.question, Further))


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What :func:`step` was given, checked."""

    scorer: Scorer | None  # None: there is no session
    sessions: list[Session]
    before: list[Context]  # of each
    after: list[Context]
    question: Question[Any]

    @classmethod
    def of(cls, sessions: Any, texts: Any, options: Any, closing: str | None, boundary: Boundary) -> _Step:
        every = _distinct(sessions)
        before = [session._context for session in every]
        after = before if texts is None else _all_appended(every, texts)
        question: Question[Any]
        if options is None or not every:
            question = Question([TokenTree.bare(context.tokens.ids) for context in after], lambda scores: None)
        else:
            reader, known = every[0]._reader.knowing(after), [context.text for context in after]
            question = choose_question(reader, known, options, closing=closing, boundary=boundary)
        return cls(every[0].scorer if every else None, every, before, after, question)

    def done(self, choices: list[Choice] | None) -> list[Choice] | None:
        """Appends the texts, now that what was asked is known."""
        for i, (session, before) in enumerate(zip(self.sessions, self.before, strict=True)):
            if session._context is not before:
                raise ValueError(f"sessions[{i}]: it was changed by somebody else during the step; take one at a time")
        for session, after in zip(self.sessions, self.after, strict=True):
            session._context = after
        return choices


def _distinct(sessions: Any) -> list[Session]:
    if isinstance(sessions, Session):
        raise TypeError("sessions: expected a list of Session, got one; put it in a list, or use its own methods")
    every = many("sessions", sessions, "a list of Session")
    first: dict[int, int] = {}
    for i, session in enumerate(every):
        if not isinstance(session, Session):
            raise TypeError(f"sessions[{i}]: expected a Session, got {type(session).__name__}")
        if session.scorer is not every[0].scorer:
            raise ValueError(
                f"sessions[{i}]: expected a session of the same Scorer as sessions[0]; step those of each Scorer alone"
            )
        if (before := first.setdefault(id(session), i)) != i:
            raise ValueError(f"sessions[{i}]: it is the same session as sessions[{before}]; fork() makes another one")
    return every


def _all_appended(sessions: Sequence[Session], texts: Any) -> list[Context]:
    if isinstance(texts, str):
        return [_appended("texts", session, texts) for session in sessions]
    each = many("texts", texts, "a str for all sessions, or a list of them")
    if len(each) != len(sessions):
        raise ValueError(f"texts: expected {len(sessions)}, one for each session, got {len(each)}")
    return [_appended(f"texts[{i}]", *of) for i, of in enumerate(zip(sessions, each, strict=True))]


def _appended(name: str, session: Session, text: str) -> Context:
    """The session's context with ``text`` behind it. Raises TypeError and ValueError for what cannot be read."""
    context = extended(session._reader.tokenizer, session._context, one_text(name, text))
    session._reader.check_whole(name, context)
    return context
