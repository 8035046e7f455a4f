"""Models that transformers computes, with psykern's attention in them or without, against the library's own forward in
fp64: however their beginnings are shared, and whatever the waves, the batches and the pages."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import make_adapter
from support.exactness import TOLERANCE
from support.foreign_cases import CASES, GPT2, VOCABULARY
from support.foreign_folders import make_foreign
from support.groups import random_group, wanted
from torch import Tensor
from transformers import PreTrainedModel

from psykern.core.errors import CheckpointError, NonFiniteError
from psykern.core.types import EncodedTranscript, TargetScores, Wanted
from psykern.engine.budgets import Budgets, budgets
from psykern.engine.engine import Engine
from psykern.engine.page_tree import PAGE_TOKENS
from psykern.engine.pages import row_bytes
from psykern.engine.plan import plan
from psykern.kernels.compute import Compute
from psykern.models.foreign import interface
from psykern.models.foreign.head import OwnLogits, PlainHead
from psykern.models.foreign.model import ForeignModel
from psykern.models.foreign.network import Network
from psykern.models.foreign.probe import read_foreign_spec
from psykern.models.weights import ModelFolder


class Oracle:
    """One forward of each distinct context, in fp64."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model).double()
        if any("experts" in name for name, _ in model.named_modules()):
            self._model.set_experts_implementation("eager")  # torch's grouped product has no fp64
        self._known: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def rows(self, group: Sequence[EncodedTranscript]) -> tuple[Tensor, Tensor]:
        """Of each target, in order: the log-probabilities of all tokens [targets, V], and which it is [targets]."""
        targets = wanted(group)
        for context, _ in sorted(targets, key=lambda target: -len(target[0])):
            if tuple(context) not in self._known:
                logits = self._model(torch.tensor([context]), use_cache=False).logits[0]
                for k, row in enumerate(logits.double().log_softmax(-1)):
                    self._known.setdefault(tuple(context[: k + 1]), row)
        tables = torch.stack([self._known[tuple(context)] for context, _ in targets])
        return tables, torch.tensor([token for _, token in targets])


def assert_scores(scores: TargetScores, group: Sequence[EncodedTranscript], oracle: Oracle) -> None:
    tables, tokens = oracle.rows(group)
    near = {"rtol": 0, "atol": TOLERANCE}
    np.testing.assert_allclose(scores.logprob, tables.gather(1, tokens[:, None])[:, 0], **near)
    np.testing.assert_allclose(scores.entropy, -(tables.exp() * tables).nan_to_num().sum(-1), **near)
    top = tables.topk(2, dim=-1).values
    clear = (top[:, 0] - top[:, 1] > 2 * TOLERANCE).numpy()
    np.testing.assert_array_equal(scores.is_argmax[clear], (tables.argmax(-1) == tokens).numpy()[clear])
    if scores.full is not None:
        np.testing.assert_allclose(scores.full, tables, **near)


def opened(folder: Path, **more: Any) -> ForeignModel:
    return ForeignModel(ModelFolder(folder), Compute.resolve("cpu"), **more)


@pytest.fixture(scope="module")
def group() -> list[EncodedTranscript]:
    """Transcripts of up to 90 tokens that share prefixes, with responses and options of several tokens."""
    return random_group(np.random.default_rng(5), 6, VOCABULARY, 3)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_library(
    name: str, group: list[EncodedTranscript], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    oracle, model = Oracle(make_foreign(tmp_path, vocab_size=VOCABULARY, **case.config)), opened(tmp_path)
    spec = model.spec
    assert (spec.mode, spec.vocab_size) == ("whole" if case.reason else "shared", VOCABULARY)
    assert (spec.reason or "").startswith(case.reason or "")
    assert case.reason or tuple(layer.mixer.window for layer in spec.layers) == case.windows
    assert isinstance(model._head, PlainHead if case.is_plain else OwnLogits)
    assert model.compute.arithmetic is None and not model.compute.is_company_free
    rows = rows_computed(monkeypatch)
    whole = plan(group, wave_tokens=4096, batch_tokens=512, min_share=4, wanted=Wanted(full=True))
    assert_scores(Engine(model).run(whole), group, oracle)
    assert case.reason or rows == [whole.num_computed]
    cut = plan(group, wave_tokens=40, batch_tokens=16, min_share=4)
    assert cut.num_waves > 3 and cut.max_carried_rows > 8
    assert_scores(Engine(model).run(cut), group, oracle)
    engine = Engine(model, session_bytes=8 * PAGE_TOKENS * row_bytes(spec, model.dtype))
    for trees in (group[:1], group[:2], group[1:4]):
        for of, tree in zip(engine.extend(trees, Budgets(64, 16, 2.0)), trees, strict=True):
            assert_scores(of, [tree], oracle)


def rows_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward from now on, but for those of the head alone."""
    rows: list[int] = []
    hidden = Network.hidden

    def counted(self: Network, token_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(len(token_ids))
        return hidden(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(Network, "hidden", counted)
    return rows


def test_scores_that_are_not_the_librarys_lead_to_whole_passes(
    group: list[EncodedTranscript], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = Oracle(make_foreign(tmp_path, vocab_size=VOCABULARY, **GPT2))
    scale_of = interface.scale_of
    monkeypatch.setattr(interface, "scale_of", lambda *given: 1.1 * scale_of(*given))
    model = opened(tmp_path)
    assert (model.spec.mode, model.spec.reason) == ("whole", "other scores than its own with psykern's attention")
    assert_scores(Engine(model).run(plan(group, wave_tokens=40, batch_tokens=16)), group, oracle)


def test_masks() -> None:
    def sees(text: str) -> interface.Mask:
        return interface.Mask(eval(f"lambda batch, head, q, k: {text}"))

    assert interface.window_of(interface.Mask(None), 64) is None
    for positions in (1, 2, 7, 64, 5000):
        assert interface.window_of(sees("k <= q"), positions) is None
    assert [interface.window_of(sees("(k <= q) & (k > q - 24)"), n) for n in (24, 25, 4096)] == [None, 24, 24]
    assert interface.window_of(sees("(k <= q) & (k > q - 1)"), 64) == 1
    for other in ("k >= 0", "k < q", "(k <= q) & (k // 16 == q // 16)", "(k <= q) | (k < 4)", "(k <= q) & (k > 8)"):
        with pytest.raises(ValueError, match="neither causal nor a sliding window"):
            interface.window_of(sees(other), 64)


def test_an_adapter_is_merged(group: list[EncodedTranscript], tmp_path: Path) -> None:
    base = make_foreign(tmp_path / "base", vocab_size=VOCABULARY, **GPT2)
    oracle = Oracle(make_adapter(tmp_path / "adapter", base, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    model = opened(tmp_path / "base", adapter=tmp_path / "adapter")
    assert model.spec.mode == "shared"
    assert_scores(Engine(model).run(plan(group[:2], wave_tokens=4096, batch_tokens=512)), group[:2], oracle)


def test_files_that_are_not_the_models(tmp_path: Path) -> None:
    make_foreign(tmp_path, vocab_size=VOCABULARY, **GPT2)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"transformer.more": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert opened(tmp_path).changes == ("tensors that transformers does not use: transformer.more",)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"tensors that are missing: transformer\.h\.1\.mlp\.c_fc\.weight"):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_numbers_that_are_not_finite_are_named(kind: str, group: list[EncodedTranscript], tmp_path: Path) -> None:
    make_foreign(tmp_path, vocab_size=VOCABULARY, **CASES[kind].config)
    model = opened(tmp_path)
    layer = model._network._model.get_submodule("transformer.h.1")
    next(layer.parameters()).data[3] = torch.inf
    with pytest.raises(NonFiniteError, match=r"began in layer 1 .* NaN or infinity: transformer\.h\.1\."):
        Engine(model).run(plan(group, wave_tokens=4096, batch_tokens=512))


def test_all_layers_of_a_wave_fit_two_gib_on_a_cpu(tmp_path: Path) -> None:
    make_foreign(tmp_path, vocab_size=VOCABULARY, **GPT2)
    spec, where = read_foreign_spec(tmp_path), (torch.device("cpu"), torch.float32)
    assert budgets(spec, *where).wave_tokens == 32_768
    row = 4096 * 2 * 4 * 32  # bytes of a row's keys and values
    mixer = replace(spec.layers[0].mixer, num_kv_heads=32, head_dim=128)
    large = replace(spec, layers=(replace(spec.layers[0], mixer=mixer),) * 32)
    assert 2**31 - 2048 * row < budgets(large, *where).wave_tokens * row <= 2**31
    assert budgets(spec.as_whole("why"), *where).wave_tokens > 32_768  # nothing is held
