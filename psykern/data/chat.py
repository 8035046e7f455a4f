"""Condition *chat*: a transcript as turns, rendered with the tokenizer's chat template.

    text outside the marks ─► user turns      response ─► assistant turn

There is no generation prompt, and ``enable_thinking`` is off where the template knows it. Contents are located without
searching for them: the template is rendered once with a unique stand-in for each content. What is then expected with
the contents in the stand-ins' places must equal what the template gives for them, else the row is refused. A template
may strip white space from the text outside the marks (Llama's do), as that leaves its words and the responses as they
are; a template that strips, drops, changes or reorders responses is an error.

The study's own rule: stretches without characters give no turn; text and full stop are those of
:func:`.protocol.study_text`; scored is what stands between the template's own tokens around a probed assistant
turn, which are found in the tokens of the whole.

Source of the rule: github.com/marcelbinz/Psych-201, ``0_analyses/eval_instruct.py``. Templates run in a sandbox
(:mod:`.sandbox`); no code of a model folder is executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import tokenizers

from psykern.core.errors import CheckpointError, RowError
from psykern.core.types import Transcript
from psykern.data.pretrained import Pretrained
from psykern.data.protocol import study_text
from psykern.data.sandbox import asks_for_date, compiled

_OF_PROCESSOR = "chat_template.json"  # which tokenizers do not read
_STAND_IN = "\ue000{}\ue001"  # private-use characters, in no transcript
_STAND_INS = re.compile("\ue000(\\d+)\ue001")

Role = Literal["user", "assistant"]


class _Turn(NamedTuple):
    role: Role
    content: str
    response: int  # whose content this is; -1: none


class Rendered(NamedTuple):
    """A transcript's text as the template gives it."""

    text: str
    marks_char: np.ndarray  # [R, 2] int64, characters of each response; second column -1: it was lost
    stripped: bool  # the template strips white space from responses


@dataclass(frozen=True, slots=True, eq=False)
class ChatTemplate:
    """The chat template of a model folder."""

    folder: Path
    source: str
    _tokenizer: Any  # transformers' own
    date: str | None = None  # that the template prints, YYYY-MM-DD; None: none yet

    @property
    def hash(self) -> str:
        """``sha256:`` and a digest in hexadecimal: of the template, and of the special tokens that it names, if any."""
        named = {name: token for name, token in self._special_tokens.items() if name in self.source}
        text = self.source + (json.dumps(named, sort_keys=True, default=str) if named else "")
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    @property
    def name(self) -> str:
        """For messages about rows: a token cache keeps them for all folders that have this template."""
        return f"{self.hash[:15]}…"

    @property
    def asks_for_date(self) -> bool:
        """Whether what it gives may depend on the date."""
        return asks_for_date(self.source)

    @classmethod
    def load(cls, folder: Path, pretrained: Pretrained | None = None) -> ChatTemplate:
        """``pretrained``: what was read of the folder before.

        Raises CheckpointError where there is no template, or more than one and none of them the default, and where the
        processor of a model that sees has another one, by which a text's dialogue looks different.
        """
        tokenizer = (pretrained or Pretrained.load(folder)).tokenizer
        try:
            file = folder / _OF_PROCESSOR
            of_processor = json.loads(file.read_text(encoding="utf-8"))["chat_template"] if file.is_file() else None
            tokenizer.chat_template = tokenizer.chat_template or of_processor
            source = tokenizer.get_chat_template() if tokenizer.chat_template else None
        except Exception as error:  # whatever a broken folder makes it raise
            raise CheckpointError(f"{folder}: its chat template cannot be read: {error}") from error
        if not source:
            raise CheckpointError(
                f"{folder}: condition chat needs a chat template (chat_template.jinja or .json, or chat_template "
                "in tokenizer_config.json); the tokenizer has none"
            )
        if of_processor not in (None, source):
            _check_equal(cls(folder, source, tokenizer), cls(folder, str(of_processor), tokenizer))
        return cls(folder, source, tokenizer)

    def at(self, date: str | None) -> ChatTemplate:
        """The template of a run of ``date``. Raises CheckpointError for one that cannot be compiled or uses chance."""
        try:
            compiled(self.source, date)
        except Exception as error:  # Jinja's own
            raise CheckpointError(f"{self.folder}: its chat template cannot be used: {error}") from error
        return replace(self, date=date)

    def render(self, transcript: Transcript) -> Transcript:
        """The transcript as a chat, its responses located in it. Raises RowError, naming the template."""
        bounds = [0, *transcript.responses_char.ravel().tolist(), len(transcript.text)]
        turns = []
        for i in range(0, len(bounds), 2):
            begin = bounds[i] + len(">>") if i else 0
            end = bounds[i + 1] - len("<<") if i + 2 < len(bounds) else bounds[i + 1]
            if begin < end:
                turns.append(_Turn("user", transcript.text[begin:end], -1))
            if i + 2 < len(bounds):
                turns.append(_Turn("assistant", transcript.text[bounds[i + 1] : bounds[i + 2]], i // 2))
        rendered = self._located(transcript, turns, len(transcript.responses_char))
        if rendered.stripped:
            self._refuse(transcript, "strips white space from a response")
        return replace(transcript, text=rendered.text, responses_char=rendered.marks_char)

    def render_study(self, transcript: Transcript) -> Rendered:
        """The text that the study tokenizes, by its own rule for turns."""
        turns, count = _study_turns(f"{study_text(transcript.text)}.")
        return self._located(transcript, turns, count)._replace(stripped=self.as_response(" u ") == "u")

    def as_response(self, option: str) -> str | None:
        """What the template makes of ``option`` in a response's place: that option, it without white space around it,
        or None: anything else."""
        return _as_response(self, option)

    def marks(self, tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
        """The study's marks: token ids between the end of a user turn and an assistant content, and those between that
        content and the next user's. Raises CheckpointError where tokens cannot tell them."""
        contents = [_STAND_IN.format(i) for i in range(2)]
        question = _Turn("user", "u", -1)
        turns = [question, _Turn("assistant", contents[0], 0), _Turn("user", contents[1], -1)]
        try:
            alone, whole = self._apply([question]), self._apply(turns)
        except Exception as error:  # the template's own
            raise CheckpointError(f"{self.folder}: its chat template refuses a plain dialogue: {error}") from error
        before = tokenizer.encode(alone, add_special_tokens=False).ids
        encoding = tokenizer.encode(whole, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        places = [whole.find(contents[0]), whole.find(contents[1])]
        if encoding.ids[: len(before)] != before or -1 in places or places[0] > places[1]:
            raise CheckpointError(
                f"{self.folder}: the study's marks cannot be told from the tokens of its chat template"
            )
        first, after, next_user = np.searchsorted(starts, [places[0], places[0] + len(contents[0]), places[1]]).tolist()
        open_ids, close_ids = encoding.ids[len(before) : first], encoding.ids[after:next_user]
        if not open_ids or not close_ids:
            raise CheckpointError(f"{self.folder}: its chat template puts no token of its own around a response")
        return open_ids, close_ids

    def _apply(self, turns: list[_Turn]) -> str:
        more = {"enable_thinking": False} if "enable_thinking" in self.source else {}
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
        return str(compiled(self.source, self.date).render(given | self._special_tokens | more))

    @property
    def _special_tokens(self) -> dict[str, Any]:
        """By the names that a template knows them by (``bos_token``), as tokenizer_config.json has them."""
        return dict(self._tokenizer.special_tokens_map)

    def _located(self, transcript: Transcript, turns: list[_Turn], count: int) -> Rendered:
        if not turns:
            return Rendered("", np.empty((0, 2), np.int64), False)
        try:
            frame = self._apply([turn._replace(content=_STAND_IN.format(i)) for i, turn in enumerate(turns)])
            text = self._apply(turns)
        except Exception as error:  # the template's own, such as that roles must alternate
            self._refuse(transcript, f"refuses the turns: {error}")
        found = [int(number) for number in _STAND_INS.findall(frame)]
        if found != list(range(len(turns))):
            lacking = sorted(set(range(len(turns))) - set(found))
            what = f"drops turn {lacking[0] + 1}" if lacking else "repeats or reorders the turns"
            self._refuse(transcript, f"{what} of {len(turns)}")
        between = _STAND_INS.split(frame)[::2]
        for stripped in ((), ("user",), ("user", "assistant")):
            contents = [turn.content.strip() if turn.role in stripped else turn.content for turn in turns]
            parts = [part for pair in zip(between, [*contents, ""], strict=True) for part in pair]
            if "".join(parts) == text:
                return Rendered(text, _marks(turns, parts, count), "assistant" in stripped)
        self._refuse(transcript, f"changes a content: {_first_change(between, turns, text)}")

    def _dialogue(self, content: str) -> str:
        """One in which ``content`` is said in the middle and at the end; a template may treat the two differently."""
        said = (_Turn("user", "u", -1), _Turn("assistant", content, 0))
        return self._apply([*said, *said])

    def _refuse(self, transcript: Transcript, what: str) -> NoReturn:
        raise RowError(transcript.source, f"the chat template {self.name} {what}")


def _check_equal(own: ChatTemplate, of_processor: ChatTemplate) -> None:
    """Raises CheckpointError where the tokenizer's template and the processor's make different dialogues of text: half
    of the model's users have the one, half the other."""
    try:
        one, other = (chat.at("2000-01-01")._dialogue("a b") for chat in (own, of_processor))
    except Exception as error:  # the template's own
        raise CheckpointError(f"{own.folder}: its chat templates cannot be compared: {error}") from error
    if one != other:
        raise CheckpointError(
            f"{own.folder}: the chat template of {_OF_PROCESSOR} is not the tokenizer's: expected one dialogue, got "
            f"{other[:80]!r} and {one[:80]!r}; remove {_OF_PROCESSOR} to score with the tokenizer's"
        )


@lru_cache(maxsize=4096)
def _as_response(chat: ChatTemplate, option: str) -> str | None:
    stand_in = _STAND_IN.format(0)
    try:
        frame, text = chat._dialogue(stand_in), chat._dialogue(option)
    except Exception:  # the template's own
        return None
    return next((said for said in (option, option.strip()) if frame.replace(stand_in, said) == text), None)


def _study_turns(text: str) -> tuple[list[_Turn], int]:
    """Turns by the study's rule, and the number of opening marks. A response that lost its closing mark is a user's."""
    turns: list[_Turn] = []
    role: Role = "user"
    number = -1
    buffer = ""
    for part in re.split("(<<|>>)", text):
        if part not in ("<<", ">>"):
            buffer += part
            continue
        if buffer:
            turns.append(_Turn("user" if part == "<<" else "assistant", buffer, number if part == ">>" else -1))
            buffer = ""
        role = "assistant" if part == "<<" else "user"
        number += part == "<<"
    if buffer:
        turns.append(_Turn(role, buffer, -1))
    return turns, number + 1


def _marks(turns: list[_Turn], parts: list[str], count: int) -> np.ndarray:
    """Where each response stands; one without a turn of its own stands, lost, where the one before it ends."""
    ends = np.cumsum([len(part) for part in parts]).tolist()
    marks = np.full((count, 2), -1, dtype=np.int64)
    for i, turn in enumerate(turns):
        if turn.response >= 0:
            marks[turn.response] = ends[2 * i], ends[2 * i + 1]
    for r in np.flatnonzero(marks[:, 0] < 0).tolist():
        marks[r, 0] = max(marks[r - 1]) if r else 0
    return marks


def _first_change(between: list[str], turns: list[_Turn], text: str) -> str:
    """Turn and content at which the rendered text is not what was expected."""
    place = 0
    for number, (part, turn) in enumerate(zip(between, turns, strict=False), start=1):
        for content in (turn.content, turn.content.strip()):
            if text.startswith(part + content, place):
                place += len(part + content)
                break
        else:
            got = text[place + len(part) : place + len(part) + len(turn.content)]
            return f"turn {number} ({turn.role}): expected {turn.content[:60]!r}, got {got[:60]!r}"
    return f"behind turn {len(turns)}: expected {between[-1][:60]!r}, got {text[place : place + 60]!r}"
