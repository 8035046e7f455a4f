"""The progress bar: responses and tokens done, and the time left."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts groups of transcripts as they are scored. The time left follows the characters of their texts, which are
    known before they are tokenized."""

    def __init__(self, characters: int, *, quiet: bool) -> None:
        self._characters = self._responses = self._tokens = 0  # of the groups begun
        self._bar: tqdm = tqdm(
            total=characters,
            disable=quiet,
            bar_format="{percentage:3.0f}% |{bar}| {desc} [{elapsed}, {remaining} left]",
        )
        self._describe(0, 0)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def start(self, characters: int, responses: int, tokens: int) -> Callable[[float], None]:
        """Begin a group; the function returned takes the share of it that is done, from 0 to 1. A group may begin while
        the one before it is under way."""
        first_character, first_response, first_token = self._characters, self._responses, self._tokens
        self._characters += characters
        self._responses += responses
        self._tokens += tokens

        def update(share: float) -> None:
            self._describe(first_response + int(responses * share), first_token + int(tokens * share))
            self._bar.update(first_character + characters * share - self._bar.n)

        return update

    def _describe(self, responses: int, tokens: int) -> None:
        self._bar.set_description_str(f"{responses:,} responses, {tokens:,} tokens", refresh=False)
