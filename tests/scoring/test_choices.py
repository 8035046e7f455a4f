"""Choices against records of the same transcript, transformers in fp64, and the other ways to ask the same."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.asked import Reference, real_reference, toy_reference
from support.exactness import TOLERANCE
from support.scoring import records, score
from support.tiny import branches, encode, transcript
from support.toy import responses, toy_rows, write_rows

from psykern.data.tokenizer import Tokenizer
from psykern.scoring.choices import choose_question

SAME = 1e-5  # nats, through all interfaces


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return toy_reference(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return real_reference(shared, "olmo-dolma2", tmp_path_factory.mktemp("real") / "model")


@pytest.mark.parametrize("boundary", ["joint", "split"])
def test_a_choice_equals_the_record_of_the_transcript(toy: Reference, tmp_path: Path, boundary: Any) -> None:
    rows = [row for row in toy_rows(count=2) if "options" in row]
    run = score(toy.folder, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", boundary=boundary)
    checked = set()
    for row, of in zip(rows, records(run), strict=True):
        given = [record for record in of if record["options"]]
        if boundary == "split":  # a record's context is in pieces, too, at the marks of the responses before it
            given = [record for record in given if record["response_index"] == 0]
        cuts = [list(responses(row["text"]))[record["response_index"]].start(1) for record in given]
        asked = [row["text"][:cut] for cut in cuts], [record["options"] for record in given]
        for record, choice in zip(given, toy.scorer.choose(*asked, boundary=boundary), strict=True):
            assert choice.options == tuple(record["options"])
            np.testing.assert_allclose(choice.logprobs, record["option_logprobs"], rtol=0, atol=SAME)
            np.testing.assert_allclose(choice.log_softmax, record["option_log_softmax"], rtol=0, atol=SAME)
            flags = {"closing_mark"} & set((record["flag"] or "").split(";"))
            assert flags == {"closing_mark"} & set((choice.flag or "").split(";"))
            checked |= flags
            if flags:
                continue
            logprobs = toy.scorer.logprobs(
                row["text"][: cuts[given.index(record)]], record["options"], boundary=boundary
            )
            np.testing.assert_allclose([one.logprob for one in logprobs], choice.logprobs, rtol=0, atol=SAME)
            assert [one.flag == "straddles" for one in logprobs].count(True) <= 1
    assert checked == {"closing_mark"}


@pytest.mark.parametrize("study", ["frey2017mpl", "shahar2019twosteptask", "guenther2024substitutions"])
def test_the_tokens_of_options_are_those_of_the_transcript(real: Reference, shared: Path, study: str) -> None:
    with gzip.open(shared / "psych" / f"{study}.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = json.loads(next(lines))["text"]
    text = text[: text.rindex(">>", 0, 4000) + 2]
    options = tuple(dict.fromkeys(match[1] for match in responses(text) if match[1].strip()))[:5]
    options = (*options, "-3", "something else")
    row = transcript(text, options)
    tokenizer = Tokenizer.load(real.folder)
    encoded = encode(tokenizer, row)
    contexts = [text[:a] for a in row.responses_char[:, 0].tolist()]
    question = choose_question(real.scorer._reader, contexts, options)
    expected = [
        (encoded.token_ids[:parent].tolist() + ids, parent + first, r) for r, parent, first, ids in branches(encoded)
    ]
    got = []
    for r, tree in enumerate(question.trees):
        for i, (parent, first) in enumerate(zip(tree.branch_parent_tok, tree.branch_scored_tok, strict=True)):
            own = tree.branch_token_ids[slice(*tree.branch_offsets[i : i + 2])]
            got.append((tree.token_ids[:parent].tolist() + own.tolist(), int(parent + first), r))
    # Behind a closing mark a transcript goes on, so that the mark's own token can be another one.
    closed = [r for r, flag in enumerate(encoded.flags) if "closing_mark" in (flag or "")]
    assert [of for of in got if of[2] not in closed] == [of for of in expected if of[2] not in closed]
    assert len(closed) < len(contexts) and len(got) == len(expected)


def test_a_closing_text_is_scored_where_options_begin_each_other(toy: Reference) -> None:
    context, options = "How sure are you, from 1 to 100? Answer: ", ["1", "10", "100"]
    choice = toy.scorer.choose(context, options, closing=" points.\n")
    assert choice.flag == "closing_mark"
    for option, logprob in zip(options, choice.logprobs, strict=True):
        expected = toy.continuation(context, f"{option} points.\n")
        assert logprob == pytest.approx(expected.logprobs.sum(), abs=TOLERANCE * 2)
    plain = toy.scorer.choose(context, ["1", "2"], closing=" points.\n")
    assert plain.flag is None
    for option, logprob in zip(["1", "2"], plain.logprobs, strict=True):
        assert logprob == pytest.approx(toy.continuation(context, option).logprobs.sum(), abs=TOLERANCE)


def test_a_token_that_reaches_into_what_stands_behind_straddles(toy: Reference) -> None:
    choice = toy.scorer.choose("You say <<", ["yes>", "no"])
    assert choice.flag == "straddles"
    ids, offsets = toy.encode("You say <<yes>>>")
    own = [i for i, (start, end) in enumerate(offsets) if start < 14 and end > 10]
    assert offsets[own[-1]][1] > 14
    assert choice.logprobs[0] == pytest.approx(toy.piece(ids, own, []).logprobs.sum(), abs=TOLERANCE * 2)


def test_log_softmax_index_and_margin(toy: Reference) -> None:
    choice = toy.scorer.choose("You press <<", ["J", "F", "yes"])
    total = math.log(math.fsum(math.exp(x) for x in choice.logprobs))
    np.testing.assert_allclose(choice.log_softmax, choice.logprobs - total, rtol=0, atol=1e-12)
    assert choice.logprobs.dtype == choice.log_softmax.dtype == np.float64
    order = sorted(range(3), key=lambda i: -choice.logprobs[i])
    assert choice.index == order[0] and choice.option == ("J", "F", "yes")[order[0]]
    assert choice.margin == choice.logprobs[order[0]] - choice.logprobs[order[1]]
    assert toy.scorer.choose("You press <<", ["J"]).margin == math.inf


def test_every_interface_says_the_same(toy: Reference, real: Reference) -> None:
    for of, context in ((toy, "You press <<"), (real, "You press ")):
        options = ["J", "F"]
        assert of.scorer.choose([], []) == of.scorer.choose([], options) == []
        choice, many = of.scorer.choose(context, options), of.scorer.choose([context, "x <<"], options)
        np.testing.assert_allclose(many[0].logprobs, choice.logprobs, rtol=0, atol=SAME)
        logprobs = [one.logprob for one in of.scorer.logprobs(context, options, boundary="split")]
        ids = [of.tokenizer.encode(option, add_special_tokens=False).ids[0] for option in options]
        np.testing.assert_allclose(logprobs, of.scorer.distributions(context, token_ids=ids), rtol=0, atol=SAME)
        np.testing.assert_allclose(logprobs, of.scorer.distributions(context)[ids], rtol=0, atol=SAME)
    surprisal = toy.scorer.surprisal("You press <<J>>.").token_surprisal
    joint = toy.scorer.logprobs("You", " press <<J>>.").logprob
    assert -surprisal[1:].sum() == pytest.approx(joint, abs=SAME) or len(surprisal) < 2


def test_options_at_the_begin_of_all_have_no_probability(real: Reference) -> None:
    assert math.isnan(real.scorer.choose("", ["J"]).margin)
    choice = real.scorer.choose("", ["J", "F"])
    assert choice.flag == "no_context" and np.isnan(choice.logprobs).all() and np.isnan(choice.log_softmax).all()
    assert math.isnan(choice.margin)
    with pytest.raises(ValueError, match="no probability"):
        _ = choice.option


@pytest.mark.parametrize(
    ("contexts", "options", "arguments", "error", "message"),
    [
        (3, ["a"], {}, TypeError, r"contexts: expected a str or a list of them, got 3 \(int\)"),
        (["a", None], ["a"], {}, TypeError, r"contexts\[1\]: expected a str, got None"),
        ("a", "J", {}, TypeError, r"options: expected a list of str, got 'J' \(str\)"),
        ("a", ["J", 1], {}, TypeError, r"options\[1\]: expected a str, got 1 \(int\)"),
        ("\ud800", ["J"], {}, ValueError, "contexts: lone surrogate"),
        ("a", ["J", "\ud800"], {}, ValueError, r"options\[1\]: lone surrogate"),
        ("a", [], {}, ValueError, "options: expected at least one option, got none"),
        (["a"], [], {}, ValueError, "options: expected at least one option, got none"),
        (["a", "b"], [["J"]], {}, ValueError, "options: expected 2, one for each context, got 1"),
        (["a", "b"], [["J"], []], {}, ValueError, r"options\[1\]: expected at least one option, got none"),
        ("a", ["J", ""], {}, ValueError, r"options\[1\] \(''\) encodes to no token after contexts"),
        (
            ["a", "b"],
            [["J"], ["F", "J", "F"]],
            {},
            ValueError,
            r"options\[1\]\[0\] \('F'\) and options\[1\]\[2\] \('F'\) encode to the same tokens after contexts\[1\]",
        ),
        (
            ["x <<", "How many? "],
            ["1", "12"],
            {},
            ValueError,
            r"the tokens of options\[0\] \('1'\) begin those of options\[1\] \('12'\) after contexts\[1\].*closing=",
        ),
        ("a", ["J"], {"boundary": 1}, ValueError, "boundary: expected one of 'joint', 'split', got 1"),
        ("a", ["J"], {"closing": b">>"}, TypeError, r"closing: expected a str, got b'>>' \(bytes\)"),
        ("a b" * 5000, ["J"], {}, ValueError, "contexts: needs .* tokens of context, the model has 4,096"),
    ],
)
def test_bad_input_is_refused_by_name(
    toy: Reference, contexts: Any, options: Any, arguments: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        toy.scorer.choose(contexts, options, **arguments)


def test_a_token_that_the_embedding_lacks_is_refused_by_name(real: Reference) -> None:
    from dataclasses import replace

    reader = replace(real.scorer._reader, vocab_size=300)
    token = max(real.tokenizer.encode(" machine", add_special_tokens=False).ids)
    with pytest.raises(
        ValueError, match=re.escape(f"contexts[1]: token {token:,} ('Ġmachine') is not among the 300 rows")
    ):
        choose_question(reader, ["a", "a machine"], ["b"])
