"""PROTOCOL.md followed one character or token at a time, and branches by tokenizing the text with each option in it."""

from __future__ import annotations

import itertools
import re
from functools import lru_cache

from support.tiny import branches

from psykern.core.types import EncodedTranscript, Transcript
from psykern.data.tokenizer import Tokenizer


@lru_cache(maxsize=64)
def whole(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer.backend.encode(text, add_special_tokens=True)
    return encoding.ids, encoding.offsets


def patched_by_the_rules(text: str) -> str:
    """PROTOCOL.md, rules 1 to 3, one character at a time."""
    text = text[:32768]
    for old, new in (("<<skip>>", "<<skip>>."), ("<<-", "<< -"), ("<<think>>", "<< think>>")):
        text = new.join(text.split(old))
    text = "More Details ->".join(text.split("More Details >>"))
    opens, closes = len(text.split("<<")) - 1, len(text.split(">>")) - 1
    if opens > closes:
        text = "<<".join(text.split("<<")[:-1])
    parts = text.split(">>")
    return ">>".join([*(part.rstrip() for part in parts[:-1]), parts[-1]])


def scored_by_the_rules(ids: list[int], open_ids: list[int], close_ids: list[int]) -> list[list[int]]:
    """PROTOCOL.md, rules 5 and 6: a label per token, then groups of neighbours."""
    labels = [False] * len(ids)
    inside, i = False, 0
    while i < len(ids):
        mark = close_ids if inside else open_ids
        is_mark = ids[i : i + len(mark)] == mark
        labels[i] = inside and not is_mark and i > 0
        inside ^= is_mark
        i += len(mark) if is_mark else 1
    spans = []
    for is_scored, group in itertools.groupby(range(len(ids)), key=labels.__getitem__):
        tokens = list(group)
        if is_scored:
            spans.append([tokens[0], tokens[-1] + 1])
    return spans


def replaced(row: Transcript, response: int, option: str) -> tuple[str, int, int]:
    """The text with another response, and where that stands."""
    a, b = row.responses_char[response].tolist()
    return row.text[:a] + option + row.text[b:], a, a + len(option)


def replaced_in_study(row: Transcript, response: int, option: str) -> tuple[str, int, int]:
    """The same under the study's rules; the response keeps its place among the opening marks."""
    text = patched_by_the_rules(replaced(row, response, option)[0])
    a, behind = ([match.end() for match in re.finditer("<<", text)] + [len(text)])[response : response + 2]
    return text, a, text.rindex(">>", a, behind)


def owner_in_study(tokenizer: Tokenizer, row: Transcript, encoded: EncodedTranscript, run: int) -> int:
    """The response that a scored run belongs to: that of the opening mark before it."""
    text = patched_by_the_rules(row.text)
    begin = whole(tokenizer, text)[1][encoded.spans_tok[run, 0]][0]
    return text[:begin].count("<<") - 1


def check_branches(tokenizer: Tokenizer, row: Transcript, encoded: EncodedTranscript, protocol: str = "exact") -> None:
    """Every branch against the tokens of the whole text with the option in the response's place."""
    study = protocol == "study"
    original = whole(tokenizer, patched_by_the_rules(row.text) if study else row.text)[0]
    for r, group in itertools.groupby(branches(encoded), key=lambda branch: branch[0]):
        response = owner_in_study(tokenizer, row, encoded, r) if study else r
        wanted = []
        for option in encoded.options[r] or ():
            text, a, b = (replaced_in_study if study else replaced)(row, response, option)
            ids, offsets = whole(tokenizer, text)
            overlaps = [i for i, (s, e) in enumerate(offsets) if s < b and e > a and e > s]
            closed = [i for i, (s, e) in enumerate(offsets) if s < b + 2 and e > a and e > s]
            wanted.append((ids, overlaps, closed))
        parts = [[ids[i] for i in overlaps] for ids, overlaps, _ in wanted]
        prefixed = any(x != y and y[: len(x)] == x for x in parts for y in parts)
        assert prefixed == ("closing_mark" in (encoded.flags[r] or ""))
        for (ids, overlaps, closed), (_, parent, first, tokens) in zip(wanted, group, strict=True):
            assert 0 <= parent <= len(encoded.token_ids) and parent + first >= 1
            assert encoded.token_ids[:parent].tolist() + tokens == ids[: (closed if prefixed else overlaps)[-1] + 1]
            assert parent + first == overlaps[0]
            changed = next((i for i, (x, y) in enumerate(zip(ids, original, strict=False)) if x != y), len(ids))
            assert parent == min(changed, overlaps[0])
