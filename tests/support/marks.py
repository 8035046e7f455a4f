"""Transcripts without their marks, scored the long way: offsets are counted in the text without them, by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from support.toy import Expected, Oracle, Row, assert_options, assert_records, expected, in_bytes, responses


def dropped(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the characters of each response."""
    out, spans, place = "", [], 0
    for match in responses(text):
        out += text[place : match.start()]
        spans.append((len(out), len(out) + len(match[1])))
        out += match[1]
        place = match.end()
    return out + text[place:], spans


def pieces(text: str) -> list[str]:
    plain, spans = dropped(text)
    cuts = [0, *itertools.chain(*spans), len(plain)]
    return [plain[i:j] for i, j in itertools.pairwise(cuts)]


def expected_records(oracle: Oracle, text: str, boundary: str) -> list[Expected]:
    if boundary == "joint":
        plain, spans = dropped(text)
        tokens = oracle.tokens(plain)
        ids, places = tokens.ids, [tokens.overlapping(*in_bytes(plain, span)) for span in spans]
    else:
        ids, places = list(oracle.tokens("").ids), []
        for number, piece in enumerate(pieces(text)):
            own = oracle.tokens(piece, special=False).ids
            if number % 2:
                places.append(list(range(len(ids), len(ids) + len(own))))
            ids += own
    rows = oracle.rows(ids, [place for of in places for place in of])
    return [expected(m[1], [rows[p] for p in of]) for m, of in zip(responses(text), places, strict=True)]


def option_logprobs(oracle: Oracle, text: str, r: int, options: Sequence[str], boundary: str) -> list[float] | None:
    """None: one option's tokens begin another's, and what stands behind does not tell them apart."""
    drafts = [(_joint if boundary == "joint" else _split)(oracle, text, r, option) for option in options]
    if _one_begins_another([[ids[p] for p in own] for ids, own, _ in drafts]):
        if _one_begins_another([ids[: closed[-1] + 1] for ids, _, closed in drafts]):
            return None
        drafts = [(ids, closed, closed) for ids, _, closed in drafts]
    return [math.fsum(row.logprob for row in oracle.rows(ids, own).values()) for ids, own, _ in drafts]


def _one_begins_another(lists: list[list[int]]) -> bool:
    return any(one != two and two[: len(one)] == one for one in lists for two in lists)


Draft = tuple[list[int], list[int], list[int]]  # ids; places of the option; and with what stands behind it


def _joint(oracle: Oracle, text: str, r: int, option: str) -> Draft:
    plain, spans = dropped(text)
    a, b = spans[r]
    changed, stop = plain[:a] + option + plain[b:], a + len(option)
    tokens = oracle.tokens(changed)
    behind = in_bytes(changed, (a, min(stop + 1, len(changed))))
    return tokens.ids, tokens.overlapping(*in_bytes(changed, (a, stop))), tokens.overlapping(*behind)


def _split(oracle: Oracle, text: str, r: int, option: str) -> Draft:
    own = pieces(text)
    ids = list(oracle.tokens("").ids)
    for piece in own[: 2 * r + 1]:
        ids += oracle.tokens(piece, special=False).ids
    first = len(ids)
    ids += oracle.tokens(option, special=False).ids
    stop = len(ids)
    behind = next((piece for piece in own[2 * r + 2 :] if piece), "")
    tokens = oracle.tokens(behind, special=False)
    ids += [tokens.ids[p] for p in tokens.overlapping(0, len(behind[:1].encode()))]
    return ids, list(range(first, stop)), list(range(first, len(ids)))


def assert_without_marks(oracle: Oracle, row: Row, records: Sequence[Row], boundary: str) -> int:
    """The records of ``row``; gives how many options' sets were compared."""
    text, each = row["text"], row.get("options")
    assert_records(records, expected_records(oracle, text, boundary))
    compared = 0
    for r, record in enumerate(records):
        options = (each[r] if isinstance(each[0], list) or each[0] is None else each) if each else None
        if options and record["options"] is not None:
            logprobs = option_logprobs(oracle, text, r, options, boundary)
            assert logprobs is not None
            assert_options(record, options, logprobs)
            compared += 1
    return compared
