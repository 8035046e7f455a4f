"""A text that grows, trial by trial, and what may follow it: a participant in a closed loop.

A session is its text and its tokens. Keys and values of what was computed are the engine's, which finds them by the
tokens: so forks share them without being told, as do sessions that begin alike, and one that went back. Nothing is
computed before it is asked for, and nothing that is asked depends on what was computed before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from psykern.core.types import TokenTree
from psykern.data.continuations import Boundary, Context, extended
from psykern.scoring.choices import choose_question
from psykern.scoring.logprobs import logprobs_question
from psykern.scoring.question import Question
from psykern.scoring.results import Choice, Logprob
from psykern.scoring.texts import Reader, many, one_text

if TYPE_CHECKING:
    from psykern.scoring.scorer import Scorer

A = TypeVar("A")


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
        reader = self._reader.knowing([self._context])
        question = choose_question(reader, self.text, options, closing=closing, boundary=boundary)
        choice: Choice = advance(self.scorer, question)
        return choice

    def logprobs(
        self, continuations: Sequence[str], *, boundary: Boundary = "joint", tokens: bool = False
    ) -> list[Logprob]:
        """log P of each of ``continuations`` behind the text, in nats; arguments, answer and errors as of
        :meth:`.Scorer.logprobs`."""
        if isinstance(continuations, str):
            continuations = [continuations]
        reader = self._reader.knowing([self._context])
        question = logprobs_question(reader, self.text, continuations, boundary=boundary, tokens=tokens)
        every: list[Logprob] = advance(self.scorer, question)
        return every

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


def advance(scorer: Scorer, question: Question[A]) -> A:
    """Computes what ``question`` needs behind what is known of its trees' beginnings, and answers it. What is computed
    of their sequences will be known."""
    return question.answer(scorer.engine.extend(question.trees, scorer.budgets, wanted=question.wanted))


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
    every = _distinct(sessions)
    contexts = [session._context for session in every] if texts is None else _all_appended(every, texts)
    if not every:
        return None if options is None else []
    scorer = every[0].scorer
    question: Question[Any]
    if options is None:
        question = Question([TokenTree.bare(context.tokens.ids) for context in contexts], lambda scores: None)
    else:
        reader, known = every[0]._reader.knowing(contexts), [context.text for context in contexts]
        question = choose_question(reader, known, options, closing=closing, boundary=boundary)
    choices: list[Choice] | None = advance(scorer, question)
    for session, context in zip(every, contexts, strict=True):
        session._context = context
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
