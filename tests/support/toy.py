"""Toy transcripts, a toy model that knows their bytes, and the oracle that scores them the long way."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
import torch
from support.checkpoints import CONFIGS, make_model
from support.exactness import TOLERANCE, in_fp64
from transformers import PreTrainedModel

CLOSE_CALL = 2 * TOLERANCE  # between the two likeliest tokens; below, rounding may choose either

Row = dict[str, Any]


def toy_rows(seed: int = 0, count: int = 6) -> list[Row]:
    """Three studies: letters, with options for all responses; numbers, of which some begin others and one has a minus
    that is one token with the opening mark, with options per response; words without options, among them an empty
    response and closing marks that are one token with what follows."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for i in range(count):
        trials = (
            f"Machine? You press <<{rng.choice(['J', 'F'])}>>. You win {rng.integers(99)} points.\n" for _ in range(8)
        )
        text = "You choose between two slot machines labeled J and F, 8 times in a row.\n" + "".join(trials)
        rows.append({"study": "bandit", "experiment": "one", "participant": i, "text": text, "options": ["J", "F"]})
    for i in range(count):
        numbers = rng.choice(["1", "10", "100", "-7"], size=5)
        text = "Rate each word from 1 to 100.\n" + "".join(f"word {k}: <<{n}>>\n" for k, n in enumerate(numbers))
        each = [["1", "10", "100", "-7"], ["7", "1"], None, ["-7", "seven", "70"], []]
        rows.append(
            {"study": "ratings", "experiment": str(i % 2), "participant": f"p{i}", "text": text, "options": each}
        )
    for i in range(count):
        words = [*rng.choice(["häuser", "a dog, a cat", "“quoted”", "yes", "well enough"], size=4), "", "end"]
        text = "<<first>> is what you say.\n" + "".join(f"You say <<{w}>>, then (<<{w}>>)\n" for w in words)
        rows.append({"study": "words", "experiment": "", "participant": i, "text": text + "Thank you for your time."})
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_toy(folder: Path, **config: Any) -> PreTrainedModel:
    """A model folder with a byte-level tokenizer that was trained on toy transcripts; digits are single, as Qwen's."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|begin|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["text"] for row in toy_rows(seed=9, count=100)], trainer)
    front = tokenizers.processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.post_processor = front
    tokenizer.save(str(folder / "tokenizer.json"))
    return make_model(folder, vocab_size=512, **(CONFIGS["qwen3"] | config))


@dataclass(frozen=True)
class Tokens:
    ids: list[int]
    bounds: list[tuple[int, int]]  # bytes of the text in UTF-8, first and one past the last

    def overlapping(self, start: int, end: int) -> list[int]:
        """The tokens that hold a byte of [start, end)."""
        if start == end:
            return []
        return [i for i, (first, stop) in enumerate(self.bounds) if first < end and stop > start and first < stop]


@dataclass(frozen=True)
class Expected:
    """One record; what has no value is None."""

    response: str | None  # None: not compared
    num_tokens: int
    logprob: float | None
    entropy: float | None
    is_argmax: bool | None
    is_close_call: bool = False


class Scored(NamedTuple):
    """One token."""

    logprob: float
    entropy: float
    is_argmax: bool
    is_close_call: bool


class Oracle:
    """Records the long way: ``model`` is transformers' own, with the tokenizer of ``folder``."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model = model
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def tokens(self, text: str, special: bool = True) -> Tokens:
        """Bytes are counted from the tokens' own spelling, not read from the library's offsets."""
        encoding = self.tokenizer.encode(text, add_special_tokens=special)
        widths = [
            0 if is_special else len(token)  # a byte-level token spells every byte as one character
            for token, is_special in zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
        ]
        ends = list(itertools.accumulate(widths))
        assert ends[-1:] in ([], [len(text.encode())]), "this oracle needs a text that the normalizer leaves as it is"
        return Tokens(encoding.ids, [(end - width, end) for end, width in zip(ends, widths, strict=True)])

    def spans(self, text: str, protocol: str, boundary: str) -> tuple[list[int], list[list[int]]]:
        """Token ids of a transcript, and the scored places of each record."""
        if protocol == "study":
            return self._study(text)
        return self._split(text) if boundary == "split" else self._joint(text)

    def _joint(self, text: str) -> tuple[list[int], list[list[int]]]:
        tokens = self.tokens(text)
        return tokens.ids, [tokens.overlapping(*in_bytes(text, match.span(1))) for match in responses(text)]

    def _split(self, text: str) -> tuple[list[int], list[list[int]]]:
        ids = list(self.tokens("").ids)
        places = []
        cuts = [0, *(cut for match in responses(text) for cut in match.span(1)), len(text)]
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            own = self.tokens(text[start:stop], special=False).ids
            if number % 2:
                places.append(list(range(len(ids), len(ids) + len(own))))
            ids += own
        return ids, places

    def _study(self, text: str) -> tuple[list[int], list[list[int]]]:
        ids = self.tokens(study_text(text)).ids
        begin, end = (self.tokens(mark, special=False).ids for mark in (" <<", ">>"))
        is_scored = [False] * len(ids)
        place = 0
        while place < len(ids):
            if ids[place : place + len(begin)] != begin:
                place += 1
                continue
            place += len(begin)
            while place < len(ids) and ids[place : place + len(end)] != end:
                is_scored[place] = True
                place += 1
            place += len(end)
        runs = itertools.groupby(range(len(ids)), key=is_scored.__getitem__)
        return ids, [list(run) for scored, run in runs if scored]

    @torch.inference_mode()
    def rows(self, ids: Sequence[int], places: Sequence[int]) -> dict[int, Scored]:
        """What the model says of the tokens at ``places``, by place."""
        scores = {}
        hidden = self.model.model(torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]
        for first in range(0, len(places), 16):
            chunk = torch.tensor(places[first : first + 16])
            table = self.model.lm_head(hidden[chunk - 1]).double().log_softmax(-1)  # [16, V]
            logprobs = table.gather(1, torch.tensor(ids)[chunk][:, None])[:, 0]
            tops = table.max(dim=1)
            contenders = (table > tops.values[:, None] - CLOSE_CALL).sum(dim=1)
            entropies = -(table.exp() * table).sum(dim=1)
            columns = (logprobs, entropies, tops.indices == torch.tensor(ids)[chunk], contenders > 1)
            values = zip(*(column.tolist() for column in columns), strict=True)
            scores.update(zip(chunk.tolist(), (Scored(*row) for row in values), strict=True))
        return scores

    def records(self, text: str, protocol: str = "exact", boundary: str = "joint") -> list[Expected]:
        ids, places = self.spans(text, protocol, boundary)
        known = [p if p and p[0] > 0 else [] for p in places]  # nothing comes before token 0
        rows = self.rows(ids, [place for of in known for place in of])
        names = [m[1] for m in responses(text)] if protocol == "exact" else [None] * len(places)
        return [expected(name, [rows[place] for place in of]) for name, of in zip(names, known, strict=True)]

    def options(self, text: str, response: int, options: Sequence[str], protocol: str = "exact") -> list[float]:
        """Each option's log-probability: the option in the response's place, and everything from the start."""
        start, stop = list(responses(text))[response].span(1)
        drafts = []
        for option in options:
            changed = text[:start] + option + text[stop:]
            if protocol == "study":
                changed = study_text(changed)
            a, b = in_bytes(changed, list(responses(changed))[response].span(1))
            tokens = self.tokens(changed)
            drafts.append((tokens.ids, tokens.overlapping(a, b), tokens.overlapping(a, b + len(">>"))))
        own = [[ids[place] for place in places] for ids, places, _ in drafts]
        begins_other = any(one != two and two[: len(one)] == one for one in own for two in own)
        scored = ((ids, closed if begins_other else places) for ids, places, closed in drafts)
        return [math.fsum(row.logprob for row in self.rows(ids, places).values()) for ids, places in scored]


def responses(text: str) -> Iterator[re.Match[str]]:
    return re.finditer("<<(.*?)>>", text, re.DOTALL)


def in_bytes(text: str, span: tuple[int, int]) -> tuple[int, int]:
    return len(text[: span[0]].encode()), len(text[: span[1]].encode())


def study_text(text: str) -> str:
    """PROTOCOL.md, rules 1 to 3."""
    text = text[:32768]
    text = text.replace("<<skip>>", "<<skip>>.").replace("<<-", "<< -").replace("<<think>>", "<< think>>")
    text = text.replace("More Details >>", "More Details ->")
    if text.count("<<") > text.count(">>"):
        text = text[: text.rfind("<<")]
    return re.sub(r"\s+>>", ">>", text)


def expected(response: str | None, rows: Sequence[Scored]) -> Expected:
    if not rows:
        return Expected(response, 0, None, None, None)
    return Expected(
        response,
        len(rows),
        logprob=math.fsum(row.logprob for row in rows),
        entropy=rows[0].entropy,
        is_argmax=all(row.is_argmax for row in rows),
        is_close_call=any(row.is_close_call for row in rows),
    )


def assert_records(records: Sequence[Row], wanted: Sequence[Expected]) -> None:
    assert len(records) == len(wanted)
    for number, (record, want) in enumerate(zip(records, wanted, strict=True)):
        assert record["response_index"] == number
        assert want.response is None or record["response"] == want.response
        assert record["num_tokens"] == want.num_tokens, record
        if want.logprob is None:
            assert record["logprob"] is record["entropy"] is record["is_argmax"] is None
            continue
        assert record["logprob"] == pytest.approx(want.logprob, rel=0, abs=TOLERANCE * want.num_tokens**0.5)
        assert record["entropy"] == pytest.approx(want.entropy, rel=0, abs=TOLERANCE)
        assert record["is_argmax"] == want.is_argmax or want.is_close_call


def assert_options(record: Row, options: Sequence[str], logprobs: Sequence[float]) -> None:
    assert record["options"] == list(options)
    assert record["option_logprobs"] == pytest.approx(logprobs, rel=0, abs=TOLERANCE)
    softmax = torch.tensor(logprobs, dtype=torch.float64).log_softmax(0).tolist()
    assert record["option_log_softmax"] == pytest.approx(softmax, rel=0, abs=2 * TOLERANCE)
    index = options.index(record["response"]) if record["response"] in options else None
    assert record["option_index"] == index


def by_transcript(table: pa.Table) -> list[list[Row]]:
    """Records in the run's order, split where a transcript begins."""
    out: list[list[Row]] = []
    for record in table.to_pylist():
        if record["response_index"] == 0:
            out.append([])
        out[-1].append(record)
    return out


@dataclass(frozen=True)
class Toy:
    model: Path
    data: Path
    rows: list[Row]
    oracle: Oracle


def make_toy_data(folder: Path, count: int = 6) -> Toy:
    """A toy model and ``count`` transcripts per study, in ``folder``."""
    model, rows = make_toy(folder / "model"), toy_rows(count=count)
    return Toy(
        folder / "model", write_rows(folder / "rows.jsonl", rows), rows, Oracle(in_fp64(model), folder / "model")
    )


CONTEXT = 100


def fitting(toy: Toy, row: Row) -> int:
    """Responses before the first whose tokens need more context than there is."""
    _, places = toy.oracle.spans(row["text"], "exact", "joint")
    needed = [max(of, default=0) for of in places]  # the token at place p is predicted from the p before it
    return next((i for i, tokens in enumerate(needed) if tokens > CONTEXT), len(needed))


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"  # of a chat


def make_talking(toy: Toy, folder: Path) -> Toy:
    """The toy model with a chat template, and rows of which two in three say something of the participant."""
    model = shutil.copytree(toy.model, folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    known: list[Row] = [{"age": 24, "sex": "F"}, {"age": 999, "PHQ": "N/A"}, {"phq8": 3.0}]
    rows = [row | known[i % 3] for i, row in enumerate(toy.rows)]
    return replace(toy, model=model, rows=rows, data=write_rows(folder / "rows.jsonl", rows))
