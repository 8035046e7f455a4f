"""option_logprobs against a full log-softmax in fp64, and what must hold whatever the numbers are."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import REFERENCE, Place, check, each_place, short, sized
from support.logprobs import TOLERANCES, fp64, problem, run, targets
from torch import Tensor

from psykern.kernels import OptionLogprobs, reference

each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=short)

SIZES = {  # rows R, vocabulary V, hidden D
    "smallest": (1, 1, 1),
    "V-127-prime": (5, 127, 33),  # no power of two divides V or D
    "V-8192-one-tile": (3, 8192, 16),
    "V-8193-one-token-more": (3, 8193, 16),
    "V-151936-of-Qwen": (2, 151_936, 8),  # 128 x 1187, which no larger tile divides
    "R-65-one-row-more": (65, 300, 24),  # than a tile of 64
    "D-896-of-Qwen-0.5B": (7, 257, 896),
}
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)


def every_token(num_rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """CSR that asks for the whole vocabulary in each row."""
    ids = torch.arange(vocabulary, dtype=torch.int32).repeat(num_rows)
    return torch.arange(num_rows + 1) * vocabulary, ids


def logprobs_by_row(scores: OptionLogprobs, num_rows: int) -> Tensor:
    """[R, V] log-probabilities, of inputs that ask for ``every_token``."""
    return scores.logits.view(num_rows, -1) - scores.lse[:, None]


@each_place
@each_dtype
@each_size
def test_equals_fp64(place: Place, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    rows, vocabulary, width = size
    if dtype != torch.float32 or vocabulary > 10_000:  # the tiles are those of fp32; 8,193 tokens are many of them
        vocabulary = sized(place, vocabulary)
    inputs = problem(rows, vocabulary, width, dtype)
    truth = fp64(*inputs)
    check(place, lambda p: run(p, *inputs), truth, TOLERANCES[dtype])  # argmax too: random logits have no near ties


@each_place
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),
    [
        (5, 127, 33),
        (17, 300, 64),  # rows that begin at multiples of 16 bytes: TMA fetches the tiles
        (130, 512, 64),
        (130, 515, 72),  # and reads 0 beyond the last row, token and number
    ],
)
def test_hidden_in_half_precision(place: Place, dtype: torch.dtype, rows: int, vocabulary: int, width: int) -> None:
    hidden, weight, *wanted = problem(rows, vocabulary, width, dtype)
    inputs = (hidden.to(dtype), weight, *wanted)
    got = check(place, lambda p: run(p, *inputs), fp64(*inputs), TOLERANCES[dtype])
    assert [t.dtype for t in got] == [torch.float32, torch.float32, torch.int64, torch.float32]


@each_place
@pytest.mark.parametrize(
    ("offsets", "ids"),
    [
        ([0], []),  # R = 0
        ([0, 0, 0, 0], []),  # nnz = 0
        ([0, 0, 1, 1], [126]),  # one option in all, the last id
        ([0, 5, 5, 5], [0, 126, 126, 0, 3]),  # all in the first row, with duplicates, in no order
        ([0, 0, 0, 5], [5, 4, 3, 2, 126]),  # all in the last row
    ],
    ids=["no-rows", "no-tokens", "one-token", "first-row-only", "last-row-only"],
)
def test_ragged_tokens(place: Place, offsets: list[int], ids: list[int]) -> None:
    hidden, weight, _, _ = problem(len(offsets) - 1, 127, 9)
    inputs = (hidden, weight, torch.tensor(offsets), torch.tensor(ids, dtype=torch.int32))
    check(place, lambda p: run(p, *inputs), fp64(*inputs), TOLERANCES[torch.float32])


@each_place
@pytest.mark.parametrize("vocabulary", [1, 127, 8192, 8193, 151_936])
def test_probabilities_sum_to_one_and_none_is_above_one(place: Place, vocabulary: int) -> None:
    vocabulary = sized(place, vocabulary)
    hidden, weight, _, _ = problem(2, vocabulary, 8)
    scores = run(place, hidden, weight, *every_token(2, vocabulary))
    logprobs = logprobs_by_row(scores, 2)
    assert (logprobs <= 0).all()
    torch.testing.assert_close(logprobs.double().exp().sum(-1), torch.ones(2).double(), rtol=0, atol=1e-5)
    assert torch.equal(scores.argmax, logprobs.argmax(-1))


@each_place
@pytest.mark.parametrize("vocabulary", [1, 127, 8193, 151_936])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 1e3], ids=["uniform", "nearly-uniform", "usual", "certain"])
def test_entropy_is_between_none_and_that_of_the_uniform(place: Place, vocabulary: int, spread: float) -> None:
    vocabulary = sized(place, vocabulary)
    hidden, weight, *wanted = problem(2, vocabulary, 8)
    entropy = run(place, hidden * spread, weight, *wanted).entropy
    assert (entropy >= 0).all()
    assert (entropy <= math.log(vocabulary) + 1e-5).all()
    if spread == 0:
        torch.testing.assert_close(entropy, torch.full((2,), math.log(vocabulary)), rtol=0, atol=1e-5)


@each_place
@pytest.mark.parametrize(
    "largest",
    [[0], [126], [7, 8, 9], [5, 126], [31, 32], [63, 64, 65]],
    ids=lambda ids: "-".join(map(str, ids)),  # the pairs stand on both sides of the borders of tiles of 32 and 64
)
def test_a_tie_goes_to_the_lowest_id(place: Place, largest: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "VOCABULARY_TILE", 32)
    assert int(run(place, *ties(127, largest)).argmax) == largest[0]


@each_place
@pytest.mark.parametrize("largest", [[8191, 8192], [5, 8195], [8192, 16384, 20_000]], ids=lambda ids: str(ids[-1]))
def test_a_tie_across_tiles_of_the_real_size_goes_to_the_lowest_id(place: Place, largest: list[int]) -> None:
    assert int(run(place, *ties(20_001, largest)).argmax) == largest[0]


@each_place
def test_all_logits_equal_gives_id_0(place: Place) -> None:
    assert run(place, torch.zeros(3, 4), torch.ones(8200, 4), *targets(3, 8200)).argmax.tolist() == [0, 0, 0]


def ties(vocabulary: int, largest: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One row whose logits are small integers, exact in any order of summation, with equal maxima at ``largest``."""
    weight = torch.randint(-3, 3, (vocabulary, 4), generator=torch.Generator().manual_seed(0)).float()
    weight[largest] = 3.0
    return torch.tensor([[1.0, 2.0, 1.0, 3.0]]), weight, *targets(1, vocabulary)


@each_place
@pytest.mark.parametrize("vocabulary", [127, 8193])
@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_adding_a_constant_to_all_logits_changes_no_probability(place: Place, vocabulary: int, shift: float) -> None:
    vocabulary = sized(place, vocabulary)
    hidden, weight, _, _ = problem(3, vocabulary, 16)
    hidden[:, 0] = 1.0
    shifted = weight.clone()
    shifted[:, 0] += shift
    wanted = every_token(3, vocabulary)
    one, other = run(place, hidden, weight, *wanted), run(place, hidden, shifted, *wanted)
    difference = logprobs_by_row(one, 3) - logprobs_by_row(other, 3)
    rounding = 16 * 2.0**-18  # in whatever order: half a step of logits near 100, for each of the 16 terms
    assert difference.abs().max() <= rounding
    assert (one.entropy - other.entropy).abs().max() <= rounding
    assert torch.equal(one.argmax, other.argmax)


@each_place
@pytest.mark.parametrize("magnitude", [1e4, 1e10, 1e30])
def test_huge_logits_stay_finite(place: Place, magnitude: float) -> None:
    """The largest logit of each row stands far above the others: its log-probability is 0, entropy 0."""
    vocabulary = sized(place, 8193)
    hidden, weight, _, _ = problem(3, vocabulary, 16)
    scores = run(place, hidden * magnitude, weight, *every_token(3, vocabulary))
    logprobs = logprobs_by_row(scores, 3)
    for values in (scores.lse, scores.logits, scores.entropy):
        assert values.isfinite().all()
    assert (logprobs <= 0).all()
    assert (logprobs.gather(1, scores.argmax[:, None]) == 0).all()
    assert scores.entropy.abs().max() <= 1e-5


@each_place
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_maximum_moves_in_every_tile_or_in_none(place: Place, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "VOCABULARY_TILE", 16)
    logits = torch.linspace(-40, 40, 127) if order == "rising" else torch.linspace(40, -40, 127)
    inputs = (torch.ones(2, 1), logits[:, None], *targets(2, 127))
    check(place, lambda p: run(p, *inputs), fp64(*inputs), TOLERANCES[torch.float32])


@each_place
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_row_that_is_not_finite_gives_no_plausible_number(place: Place, bad: float) -> None:
    hidden, weight, *wanted = problem(4, 8193, 16)
    clean = run(place, hidden, weight, *wanted)
    hidden[2, 5] = bad
    scores = run(place, hidden, weight, *wanted)
    assert not scores.lse[2].isfinite() and scores.entropy[2].isnan()
    if math.isnan(bad):
        assert scores.lse[2].isnan()
    others = [0, 1, 3]
    torch.testing.assert_close(scores.lse[others], clean.lse[others], rtol=1e-6, atol=TOLERANCES[torch.float32])
    torch.testing.assert_close(scores.entropy[others], clean.entropy[others], rtol=1e-6, atol=TOLERANCES[torch.float32])


@each_place
@pytest.mark.parametrize("token", [0, 8191, 8192], ids=["first", "last-of-tile", "last"])
def test_a_weight_that_is_nan_shows_in_every_row(place: Place, token: int) -> None:
    hidden, weight, *wanted = problem(3, 8193, 16)
    weight[token, 3] = math.nan
    scores = run(place, hidden, weight, *wanted)
    assert scores.lse.isnan().all() and scores.entropy.isnan().all()


@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 5, 10])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 45])
def test_reference_with_tiles_that_do_not_divide_the_sizes(
    num_rows: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "ROW_TILE", 4)
    monkeypatch.setattr(reference, "VOCABULARY_TILE", 16)
    inputs = problem(num_rows, vocabulary, 9)
    check(REFERENCE, lambda p: run(p, *inputs), fp64(*inputs), TOLERANCES[torch.float32])


def test_reference_never_holds_more_than_a_tile_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the proof that the cases above reach whole and partial tiles of rows and of tokens."""
    monkeypatch.setattr(reference, "ROW_TILE", 4)
    monkeypatch.setattr(reference, "VOCABULARY_TILE", 16)
    tiles: list[tuple[int, ...]] = []
    product = torch.mm

    def record(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        tiles.append(tuple(out.shape))
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", record)
    run(REFERENCE, *problem(10, 45, 9))
    assert tiles == [(rows, tokens) for rows in (4, 4, 2) for tokens in (16, 16, 13)]
