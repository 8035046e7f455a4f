"""What of a model folder makes tokens of a text; it needs no weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from psykern.core.clock import Clock
from psykern.core.errors import CheckpointError
from psykern.core.settings import Implementation, Settings
from psykern.data.chat import ChatTemplate
from psykern.data.encode import Encoder
from psykern.data.pretrained import Pretrained
from psykern.data.tokenizer import Tokenizer
from psykern.models.checkpoint import read_config
from psykern.models.decoder import DecoderSpec
from psykern.models.families import read_spec
from psykern.models.foreign.library import is_foreign
from psykern.models.foreign.probe import read_foreign_spec
from psykern.models.locate import locate
from psykern.scoring.texts import Reader


@dataclass(frozen=True, eq=False)
class Language:
    """The tokenizer and what stands beside it. Filled by :meth:`load`."""

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

    def reader(self, spec: DecoderSpec) -> Reader:
        """Makes tokens of texts in memory, for a model of ``spec``."""
        special = self.pretrained.tokenizer
        said = (special.bos_token_id, special.eos_token_id, self._bos_of_config(spec.vocab_size))
        bos = next((token for token in said if token is not None), None)
        return Reader(self.tokenizer, bos, spec.vocab_size, spec.max_positions)

    def _bos_of_config(self, vocab_size: int) -> int | None:
        """Of ``config.json``: GPT-2's tokenizer files name no special token."""
        if not (self.folder / "config.json").is_file():  # an adapter's
            return None
        token = read_config(self.folder).get("bos_token_id")
        return token if isinstance(token, int) and 0 <= token < min(vocab_size, self.tokenizer.size) else None


def decoder_spec(folder: Path, implementation: Implementation) -> DecoderSpec:
    """What a model is made of, by its ``config.json``; no weights are read. Raises CheckpointError for what is none of
    psykern's, and where transformers' modules could compute it, says so."""
    if implementation == "transformers":
        return read_foreign_spec(folder)
    try:
        return read_spec(folder)
    except CheckpointError as error:
        if not is_foreign(folder):
            raise
        raise CheckpointError(
            f"{error}; --implementation transformers computes it through transformers' own modules"
        ) from error


def load_language(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    implementation: Implementation = "auto",
    clock: Clock | None = None,
) -> tuple[DecoderSpec, Language]:
    """What ``model`` is made of, but for its weights and the adapter's, which are not downloaded either."""
    with (clock or Clock())("load"):
        located = locate(model, adapter, revision=revision, weights=False)
        spec = decoder_spec(located.base, implementation)
        return spec, Language.load(located.tokenizer, spec.vocab_size)
