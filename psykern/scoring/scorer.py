"""A model and its tokenizer, loaded once and used as often as wanted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from psykern.core.clock import Clock
from psykern.core.errors import CheckpointError
from psykern.core.settings import Settings
from psykern.data.chat import ChatTemplate
from psykern.data.encode import Encoder
from psykern.data.pretrained import Pretrained
from psykern.data.tokenizer import Tokenizer
from psykern.engine.budgets import Budgets, budgets
from psykern.engine.engine import Engine
from psykern.kernels.compute import Compute
from psykern.models.checkpoint import at_revision, hash_model, resolve_model
from psykern.models.families import read_spec
from psykern.models.model import Model
from psykern.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Language:
    """What of a model folder makes tokens of a text; it needs no weights."""

    tokenizer: Tokenizer
    chat: ChatTemplate | None  # None: it was not asked for
    beyond: int | None  # token ids from here on have no row in the model's embedding; None: all have

    @classmethod
    def load(cls, folder: Path, vocab_size: int, *, chat: bool) -> Language:
        """``vocab_size``: rows of the model's embedding.

        Raises CheckpointError where something is missing, or no text can be encoded for such a model.
        """
        pretrained = Pretrained.load(folder)
        template = ChatTemplate.load(folder, pretrained) if chat else None
        tokenizer = Tokenizer.load(folder, pretrained)
        around = max((*tokenizer.front, *tokenizer.back), default=0)
        if around >= vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer puts token {around:,} around every text and the embedding has {vocab_size:,} "
                "rows; they are not of one model"
            )
        return cls(tokenizer, template, vocab_size if tokenizer.size > vocab_size else None)

    def encoder(self, settings: Settings) -> Encoder:
        """Encodes transcripts as ``settings`` say. Raises CheckpointError for a chat template that cannot be used."""
        chat = self.chat.at(settings.date) if self.chat and settings.condition == "chat" else None
        return Encoder(self.tokenizer, settings, chat, beyond=self.beyond)


@dataclass(frozen=True, slots=True, eq=False)
class Scorer:
    """A loaded model. Filled by :meth:`load`; ``engine`` is all that computes, so another one can stand in for it."""

    name: str  # as the user gave it, with the revision
    hash: str  # of config and weights
    model: Model
    language: Language
    engine: Engine
    budgets: Budgets  # that suit the device, as it was when the model had been loaded and nothing else

    @classmethod
    def load(
        cls,
        model: str | Path,
        compute: Compute,
        *,
        chat: bool = False,
        revision: str | None = None,
        clock: Clock | None = None,
    ) -> Scorer:
        """``model``: a folder or a hub id; ``chat``: its chat template will be needed; ``revision``: of the hub id.

        Raises CheckpointError for a folder that cannot be used.
        """
        model, clock = at_revision(model, revision), clock or Clock()
        with clock("load"):
            folder = resolve_model(model)
            language = Language.load(folder, read_spec(folder).vocab_size, chat=chat)
            decoder = Model(folder, compute)  # last, as it takes longest
            suitable = budgets(decoder.spec, compute.device, compute.dtype)
        with clock("hash"):
            return cls(str(model), hash_model(folder), decoder, language, Engine(decoder), suitable)


def load_language(
    model: str | Path, *, chat: bool, revision: str | None = None, clock: Clock | None = None
) -> tuple[ModelSpec, Language]:
    """What ``model`` is made of, but for its weights, which are not downloaded either."""
    with (clock or Clock())("load"):
        folder = resolve_model(model, weights=False, revision=revision)
        spec = read_spec(folder)
        return spec, Language.load(folder, spec.vocab_size, chat=chat)
