"""A model and its tokenizer, loaded once and used as often as wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from psykern.core.clock import Clock
from psykern.core.errors import CheckpointError
from psykern.core.settings import Backend, Device, Dtype, Settings
from psykern.data.chat import ChatTemplate
from psykern.data.continuations import Boundary
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
from psykern.scoring.choices import choose_question
from psykern.scoring.distributions import At, distributions_question
from psykern.scoring.logprobs import logprobs_question
from psykern.scoring.question import Question
from psykern.scoring.session import Session
from psykern.scoring.surprisal import First, surprisal_question
from psykern.scoring.texts import Reader

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

    @cached_property
    def _reader(self) -> Reader:
        """Makes tokens of what it is given."""
        spec, special = self.model.spec, self.language.pretrained.tokenizer
        bos = special.bos_token_id if special.bos_token_id is not None else special.eos_token_id
        return Reader(self.language.tokenizer, bos, spec.vocab_size, spec.max_positions)

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
        return self.ask(
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
        return self.ask(choose_question(self._reader, contexts, options, boundary=boundary, closing=closing))

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
        its eos_token, also where it puts none; ``"null"`` none: the first token has NaN. ``start``: a text in front
        that is read and not reported. ``ranks``: of every token, 1: none is likelier. ``trailing_space``: words are
        corrected for the white space that the tokens of the word behind them begin with: with B(c) the probability that
        the next token begins with white space or is a special one, the surprisal of a word w gains
        log B(text before w) and loses log B(text with w); :mod:`psykern.scoring.surprisal` says of which words.

        Raises TypeError for what is no text, ValueError for ``"bos"`` without such a token, ``trailing_space`` with a
        tokenizer whose words do not begin with a space, and a text that the model cannot read.
        """
        return self.ask(
            surprisal_question(
                self._reader, texts, first=first, start=start, ranks=ranks, trailing_space=trailing_space
            )
        )

    def distributions(
        self,
        contexts: str | Sequence[str],
        *,
        token_ids: Sequence[int] | None = None,
        top_k: int | None = None,
        at: At = "end",
    ) -> Any:
        """log P of the next token, in nats: [n, V] float32 of all V rows of the model's vocabulary behind n contexts.

        With ``token_ids`` of these K tokens alone, [n, K] float32; with ``top_k`` the likeliest, as :class:`.TopTokens`
        of [n, K] arrays. One context gives arrays without the first axis. ``at``: ``"end"`` of a context; a list of P
        numbers of tokens, special ones in front included, behind which to ask: [n, P, …]; ``"all"``, behind every
        token: a list with an array [T, …] for each context.

        Raises TypeError for what is no text or no token id, ValueError for tokens that the model does not have, places
        that a context does not have, a context without a token, and a text that the model cannot read.
        """
        return self.ask(distributions_question(self._reader, contexts, token_ids=token_ids, top_k=top_k, at=at))

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

    def ask(self, question: Question[A]) -> A:
        """Computes what ``question`` needs, all of it in one plan, and answers it."""
        planned = plan(
            question.trees,
            wave_tokens=self.budgets.wave_tokens,
            batch_tokens=self.budgets.batch_tokens,
            wanted=question.wanted,
        )
        return question.answer(list(scores_of_each(question.trees, self.engine.run(planned))))


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    wave_tokens: int | None = None,
    batch_tokens: int | None = None,
    session_bytes: int | None = None,
    chat: bool = False,
    clock: Clock | None = None,
) -> Scorer:
    """A checkpoint, loaded to score whatever it is given, as often as wanted.

    model: a folder or a hub id; ``revision``: a branch, tag or commit of the latter, as ``owner/name@REVISION`` says
    too. device: ``auto``, ``cpu``, ``cuda`` or one of several, ``cuda:1``. dtype: of the arithmetic, ``float32``,
    ``bfloat16`` or ``float16``; ``auto``: float32 on a CPU, bfloat16 on a GPU. backend: of the kernels.
    ``wave_tokens``, ``batch_tokens``: memory against speed, as in :class:`.Settings`. ``session_bytes``: memory for the
    keys and values of sessions, taken when the first one computes (on a CPU as it is used); None: 40 % of what is free
    then on a CPU, a quarter on a GPU, at most what 262,144 tokens need. On a CPU the layers are then copied, too, where
    that takes no more than 40 % of what is free: a small step is faster by a third, and by far more where they are
    stored in another dtype. ``chat``: a chat template will be needed, so say at once if there is none.

    Raises CheckpointError for a folder that cannot be used, BackendError for a device or backend that is not there,
    ValueError for a word that is none of these.
    """
    if session_bytes is not None and session_bytes < 0:
        raise ValueError(f"session_bytes: expected a number of bytes, at least 0, got {session_bytes}")
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
    return Scorer(str(model), folder, decoder, language, Engine(decoder, session_bytes=session_bytes), suitable)


def load_language(
    model: str | Path, *, revision: str | None = None, clock: Clock | None = None
) -> tuple[ModelSpec, Language]:
    """What ``model`` is made of, but for its weights, which are not downloaded either."""
    with (clock or Clock())("load"):
        folder = resolve_model(model, weights=False, revision=revision)
        spec = read_spec(folder)
        return spec, Language.load(folder, spec.vocab_size)
