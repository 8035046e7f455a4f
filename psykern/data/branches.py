"""A branch of tokens for each answer option of a response: the transcript's tokens if the response were that option.

In a joint text the option can change tokens around it, so a window around the response is tokenized again with the
option in its place. A window begins and ends at pre-tokens at least two away from the marks. It counts only if it
reproduces the transcript's own tokens and if every option leaves its ends as they are; else the whole text is tokenized
again. In a split text an option's tokens are those of the option alone.

Where the tokens of an option are a proper prefix of another's, all options of that response also get the tokens of
the closing mark: else P("1") would contain P("10"). In a chat that mark is what the template puts behind a response.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from psykern.data.protocol import CLOSE_MARK
from psykern.data.tokenizer import Snippets, Tokenizer, Tokens

_WINDOW_WORDS = 2  # whole pre-tokens between a window's ends and the marks

_START = itemgetter(0)
_END = itemgetter(1)

Insert = tuple[str, str]  # text between the marks; closing mark with what a patch put behind it
Options = tuple[str, ...] | None  # of one response


@dataclass(frozen=True, slots=True, eq=False)
class JointText:
    """A text that was tokenized as one string, with what its windows are cut from."""

    text: str
    tokens: Tokens
    marks_char: np.ndarray  # [R, 2] int64, the characters that an option replaces
    closes: list[str]  # [R] the closing mark behind them, with what a patch put behind it
    inserts: list[tuple[Insert, ...] | None]  # [R] what each option puts in the place of both
    close_chars: int = len(CLOSE_MARK)  # behind an option: what tells it from one that it begins
    reach_chars: int = 0  # in front of the marks: a window begins there at the latest


class _Site(NamedTuple):
    """A window of a text around one response, with what each option puts in the response's place."""

    left: str  # up to the opening mark's end
    response: Insert
    right: str
    options: tuple[Insert, ...]
    close_chars: int
    starts_text: bool
    ends_text: bool

    def text(self, insert: Insert) -> str:
        return f"{self.left}{insert[0]}{insert[1]}{self.right}"

    def texts(self) -> Iterator[str]:
        return map(self.text, (self.response, *self.options))

    @property
    def is_whole(self) -> bool:
        return self.starts_text and self.ends_text


class _Candidate(NamedTuple):
    """An option's tokens. The numbers are indices into ``ids``."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # characters of each
    begin: int  # where its branch begins
    first: int  # its first scored token
    stop: int  # past its last token
    closed: int  # past the last token of the closing mark


class Branches(NamedTuple):
    """The branches of one response's options, counted from a token of the transcript."""

    original: list[int]  # the transcript's tokens from there on that the branches were checked against
    parents: list[int]  # [O] tokens before each branch
    scored: list[int]  # [O] first scored token, within the branch
    lengths: list[int]  # [O]
    token_ids: list[int]  # all branches, end to end
    chars: list[list[tuple[int, int]]]  # [O] first and one-past-last character of each of an option's own tokens
    option_char: int  # where an option begins among those characters
    closing_mark: bool
    blank: int | None  # the first option without tokens
    same: tuple[int, int] | None  # the first two options of the same tokens
    contained: tuple[int, int] | None  # two options, of which one's tokens, closing mark and all, begin the other's

    def unusable(self, options: tuple[str, ...], response: int) -> str | None:
        """What is wrong with one of the ``options``, all counted from 1 as ``response`` is; None: nothing."""
        if self.blank is not None:
            return f'option {self.blank + 1} ("{options[self.blank]}") of response {response} encodes to no token'
        if self.same is not None:
            one, two = (f'{i + 1} ("{options[i]}")' for i in self.same)
            return f"options {one} and {two} of response {response} encode to the same tokens"
        if self.contained is not None:
            one, two = (f'{i + 1} ("{options[i]}")' for i in self.contained)
            return (
                f"the tokens of option {one} of response {response} begin those of option {two}, and what stands "
                "behind the response does not tell them apart"
            )
        return None


Placed = tuple[int, Branches]  # the token of the transcript that the branches count from


def joint_branches(tokenizer: Tokenizer, joints: Sequence[JointText]) -> Iterator[list[Placed | None]]:
    """The branches of each text's responses. Equal windows are tokenized once."""
    sites = [_sites(tokenizer, joint) for joint in joints]
    windows = dict.fromkeys(site for of in sites for site, _, _ in of.values() if not site.is_whole)
    known: dict[_Site, Branches | None] = {}
    for inside in (False, True):  # what a tokenizer puts in front of a text is not in front of a window inside it
        own = [site for site in windows if site.starts_text != inside]
        is_plain = not inside or tokenizer.inside is None
        snippets = Snippets(tokenizer, (text for site in own for text in site.texts()), inside=not is_plain)
        known |= {site: _site_branches(site, snippets) for site in own}
    for joint, of in zip(joints, sites, strict=True):
        placed: list[Placed | None] = [None] * len(joint.inserts)
        for r, (site, begin, end) in of.items():
            branches = known.get(site)
            if branches is not None and branches.original == joint.tokens.ids[begin:end].tolist():
                placed[r] = begin, branches
            else:
                placed[r] = len(tokenizer.front), _whole_branches(tokenizer, joint, r, site)
        yield placed


def _sites(tokenizer: Tokenizer, joint: JointText) -> dict[int, tuple[_Site, int, int]]:
    """The window of each response with options, and the tokens [begin, end) of the transcript that it covers."""
    sites = {}
    with_options = [r for r, inserts in enumerate(joint.inserts) if inserts]
    windows = _windows(tokenizer, joint, with_options).tolist() if with_options else []
    for r, (begin, end, left, right) in zip(with_options, windows, strict=True):
        a, b = joint.marks_char[r].tolist()
        site = _Site(
            left=joint.text[left:a],
            response=(joint.text[a:b], joint.closes[r]),
            right=joint.text[b + len(joint.closes[r]) : right],
            options=joint.inserts[r] or (),
            close_chars=joint.close_chars,
            starts_text=left == 0,
            ends_text=right == len(joint.text),
        )
        sites[r] = site, begin, end
    return sites


def _windows(tokenizer: Tokenizer, joint: JointText, responses: list[int]) -> np.ndarray:
    """[n, 4] int64, the first and one-past-last token, then character, of the window around each response."""
    tokens = joint.tokens
    own_first, own_stop = len(tokenizer.front), len(tokens.ids) - len(tokenizer.back)
    if own_first == own_stop:
        return np.array([[own_first, own_stop, 0, len(joint.text)]] * len(responses))
    a, b = joint.marks_char[responses].T
    after = b + [len(joint.closes[r]) for r in responses]
    opening = np.searchsorted(tokens.end_char, a - max(len("<<"), joint.reach_chars), side="right")
    opening = np.minimum(opening, own_stop - 1)  # the last characters of a text may be in no token
    closing = np.searchsorted(tokens.start_char, after, side="left") - 1
    begin = np.searchsorted(tokens.word, tokens.word[opening] - _WINDOW_WORDS, side="left")
    end = np.searchsorted(tokens.word, tokens.word[closing] + _WINDOW_WORDS, side="right")
    begin, end = np.maximum(begin, own_first), np.minimum(end, own_stop)
    # A window ends where the next token starts, as a composed character's last part is in no token.
    left = np.where(begin == own_first, 0, tokens.start_char[begin])
    right = np.where(end == own_stop, len(joint.text), np.append(tokens.start_char, 0)[end])
    return np.stack([begin, end, left, right], axis=1).astype(np.int64)


def _whole_branches(tokenizer: Tokenizer, joint: JointText, r: int, site: _Site) -> Branches:
    """The branches of response r from the whole text: always exact, and slow."""
    a, b = joint.marks_char[r].tolist()
    after = joint.text[b + len(joint.closes[r]) :]
    whole = site._replace(left=joint.text[:a], right=after, starts_text=True, ends_text=True)
    branches = _site_branches(whole, Snippets(tokenizer, whole.texts()))
    assert branches is not None  # only a window can be too narrow
    return branches


def _site_branches(site: _Site, snippets: Snippets) -> Branches | None:
    """The branches in one window. None: an option changes a token at an end of the window, so it is too narrow."""
    original, known = snippets[site.text(site.response)]
    candidates = []
    for insert in site.options:
        ids, offsets = snippets[site.text(insert)]
        candidate = _candidate(site, insert, original, ids, offsets)
        if not site.starts_text and candidate.begin == 0:
            return None
        if not site.ends_text:
            grown = len(site.text(insert)) - len(site.text(site.response))
            resumed = ids[-1] == original[-1] and offsets[-1][0] == known[-1][0] + grown
            if not (resumed and candidate.closed < len(ids)):
                return None
        candidates.append(candidate)
    return _branches(original, candidates, len(site.left))


def _candidate(
    site: _Site, insert: Insert, original: list[int], ids: list[int], offsets: list[tuple[int, int]]
) -> _Candidate:
    """An option's branch begins at its first scored token, or at the token before that where the text's tokens
    change."""
    a = len(site.left)
    b = a + len(insert[0])
    first = bisect_right(offsets, a, key=_END)
    stop = max(first, bisect_left(offsets, b, key=_START)) if insert[0] else first
    changed = next((i for i, (new, old) in enumerate(zip(ids, original, strict=False)) if new != old), first)
    closed = max(stop, bisect_left(offsets, b + site.close_chars, key=_START))
    return _Candidate(ids, offsets, begin=min(first, changed), first=first, stop=stop, closed=closed)


def _branches(original: list[int], candidates: Sequence[_Candidate], option_char: int) -> Branches:
    """The branches of a response's options, with the closing mark's tokens where the options need them."""
    options = sorted(c.ids[c.first : c.stop] for c in candidates)
    # In sorted order, a list that begins any other begins the next one that differs from it.
    closing_mark = any(len(one) < len(two) and two[: len(one)] == one for one, two in pairwise(options))
    stops = [c.closed if closing_mark else c.stop for c in candidates]
    return Branches(
        original=original,
        parents=[c.begin for c in candidates],
        scored=[c.first - c.begin for c in candidates],
        lengths=[stop - c.begin for c, stop in zip(candidates, stops, strict=True)],
        token_ids=[token for c, stop in zip(candidates, stops, strict=True) for token in c.ids[c.begin : stop]],
        chars=[c.offsets[c.first : c.stop] for c in candidates],
        option_char=option_char,
        closing_mark=closing_mark,
        blank=next((i for i, c in enumerate(candidates) if c.first == c.stop), None),
        same=_same(candidates),
        contained=_contained(candidates) if closing_mark else None,
    )


def _same(candidates: Sequence[_Candidate]) -> tuple[int, int] | None:
    """Two options that would each be given the probability of both, up to the end of the closing mark."""
    seen: dict[tuple[int, ...], int] = {}
    for i, c in enumerate(candidates):
        first = seen.setdefault((c.begin, *c.ids[c.begin : c.closed]), i)
        if first != i:
            return first, i
    return None


def _contained(candidates: Sequence[_Candidate]) -> tuple[int, int] | None:
    """Two options of which one would be given the other's probability too: a chat template may put nothing behind the
    last response, and an option may itself hold what stands there."""
    base = min(c.begin for c in candidates)
    paths = sorted((c.ids[base : c.closed], i) for i, c in enumerate(candidates))
    pairs = ((i, j) for (one, i), (two, j) in pairwise(paths) if len(one) < len(two) and two[: len(one)] == one)
    return next(pairs, None)


def split_branches(
    options: tuple[str, ...], after: str, snippets: Snippets, close_chars: int = len(CLOSE_MARK)
) -> Branches:
    """``after`` is the piece behind an option; its first ``close_chars`` characters are the closing mark."""
    ids, offsets = snippets[after]
    closing = ids[: bisect_left(offsets, close_chars, key=_START)]
    candidates = []
    for option in options:
        own, chars = snippets[option]
        candidates.append(_Candidate(own + closing, chars, 0, 0, len(own), len(own) + len(closing)))
    return _branches([], candidates, 0)
