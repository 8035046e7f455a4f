"""lm-evaluation-harness with psykern against its own backend ``hf``, on the same requests and tasks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval
import lm_eval.evaluator
import lm_eval.tasks
import pytest
import tokenizers
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from support.adapters import make_adapter
from support.checkpoints import CONFIGS
from support.toy import make_toy, toy_rows

import psykern
from psykern import PsykernError, Scorer, cli, demo
from psykern.integrations import lm_eval as integration
from psykern.integrations.lm_eval import PsykernLM

BEGIN = "<|begin|>"
CLOSE = 2e-4  # nats, of a sum of tens of tokens; both are rounded in fp32
CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{% if not loop.last or add_generation_prompt %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if thinking %} thinks{% endif %} {% endif %}"
)
PAIRS = [
    *[("Machine? You press <<", option) for option in ("J", "F", "J>>. You win 10 points.")],
    ("Machine? You press <<  \n", "J"),  # white space that goes over to the continuation
    ("Machine? You press", " <<J>>"),
    ("", "You press <<J>>."),
    ("", f"{BEGIN}You press"),  # what stands before a text without context is there already
    (f"{BEGIN}You press <<", "J"),  # and before one with
    ("You say häuser, “quoted”", " and 你好 🙂"),
    ("word 1: <<10>>\n" * 12, "word 2: <<-7>>"),
    ("Machine? You press <<", "J"),  # as the first
]


class Sides(NamedTuple):
    folder: Path
    ours: PsykernLM
    theirs: HFLM

    def both(self, **arguments: Any) -> tuple[PsykernLM, HFLM]:
        return _ours(self.folder, **arguments), _theirs(self.folder, **arguments)


def _ours(folder: Path, **arguments: Any) -> PsykernLM:
    return PsykernLM(str(folder), device="cpu", **arguments)


def _theirs(folder: Path, **arguments: Any) -> HFLM:
    return HFLM(str(folder), device="cpu", dtype="float32", **arguments)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """A llama whose tokenizer puts a token in front of every text, and a qwen2 whose tokenizer does not."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    make_toy(folder, **{"head_dim": 16} | CONFIGS[request.param])
    _language(folder, is_front=request.param == "llama")
    return Sides(folder, _ours(folder), _theirs(folder))


def _language(folder: Path, *, is_front: bool) -> None:
    """Without the token in front there is no BOS either, as in Qwen's models: what is put before a text is EOS."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT}
    config |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), BEGIN)
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # `hf` with an adapter takes the rows without a token away from the embedding, so that none may be without.
    tokenizer.add_tokens([f"<more {i}>" for i in range(512 - tokenizer.get_vocab_size())])
    definition = json.loads(tokenizer.to_str())
    if is_front:
        config["bos_token"] = BEGIN
    else:
        definition["post_processor"] = None
    path.write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _instances(kind: str, texts: list[tuple[Any, ...]], task: str = "task") -> list[Instance]:
    return [Instance(kind, {}, args, i, metadata=(task, i, 1)) for i, args in enumerate(texts)]


def _greedy_pairs(model: HFLM) -> list[tuple[str, str]]:
    """Contexts with the likeliest next token, where it can be written as a text."""
    pairs = []
    for row in toy_rows()[:12]:
        ids = model.tok_encode(row["text"][:60])
        with torch.inference_mode():
            text = model.tokenizer.decode(model._model_call(torch.tensor([ids]))[0, -1].argmax())
        if text.strip() and "\ufffd" not in text and model.tok_encode(row["text"][:60] + text)[: len(ids)] == ids:
            pairs.append((row["text"][:60], text))
    return pairs


def _assert_equal(got: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [logprob for logprob, _ in got] == pytest.approx([logprob for logprob, _ in expected], rel=0, abs=CLOSE)
    assert [is_greedy for _, is_greedy in got] == [is_greedy for _, is_greedy in expected]


def test_loglikelihoods_are_those_of_hf(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = _instances("loglikelihood", PAIRS + _greedy_pairs(sides.theirs))
    calls, own = [], Scorer.token_logprobs
    monkeypatch.setattr(Scorer, "token_logprobs", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    got = sides.ours.loglikelihood(requests, disable_tqdm=True)
    assert len(calls) == 1  # so all are one trie
    expected = sides.theirs.loglikelihood(requests, disable_tqdm=True)
    assert {True, False} == {is_greedy for _, is_greedy in expected}
    _assert_equal(got, expected)
    assert got[0] == got[len(PAIRS) - 1]


def test_what_is_too_long_is_cut_at_the_left(sides: Sides) -> None:
    ours, theirs = sides.both(max_length=16)
    assert ours.max_length == theirs.max_length == 16 and sides.ours.max_length == sides.theirs.max_length == 4096
    requests = _instances("loglikelihood", PAIRS)
    _assert_equal(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True))


def test_whole_texts_are_scored_as_by_hf_in_windows_too(sides: Sides) -> None:
    ours, theirs = sides.both(max_length=16)
    requests = _instances("loglikelihood_rolling", [(row["text"],) for row in toy_rows()[::5]] + [("",), ("a",)])
    for one, other in ((ours, theirs), (sides.ours, sides.theirs)):
        got, expected = one.loglikelihood_rolling(requests), other.loglikelihood_rolling(requests, disable_tqdm=True)
        assert got == pytest.approx(expected, rel=0, abs=5 * CLOSE)  # of hundreds of tokens


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_tokens_are_those_of_hf(sides: Sides, add_bos_token: bool | None) -> None:
    ours, theirs = sides.both(add_bos_token=add_bos_token) if add_bos_token is not None else sides[1:]
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    for text in ("", "You press", f"{BEGIN}You press", " two  spaces  "):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), (text, special)
    assert ours.tokenizer_name == theirs.tokenizer_name


def test_an_adapter_is_merged_and_the_prefix_may_be_chosen(sides: Sides, tmp_path: Path) -> None:
    base = _theirs(sides.folder).model
    make_adapter(tmp_path, base, r=4, target_modules=["q_proj", "down_proj"])
    ours, theirs = sides.both(peft=str(tmp_path), prefix_token_id=7)
    requests = _instances("loglikelihood", [("", "You press <<J>>."), *PAIRS[:2]])
    got, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    _assert_equal(got, expected)
    assert abs(got[0][0] - sides.ours.loglikelihood(requests)[0][0]) > 0.1


def _task(kind: str = "multiple_choice") -> dict[str, Any]:
    def documents(**_: Any) -> dict[str, datasets.Dataset]:
        rows = [{"question": f"Machine {i}? You press", "answer": i % 2} for i in range(6)]
        return {"examples": datasets.Dataset.from_list(rows[:2]), "test": datasets.Dataset.from_list(rows[2:])}

    choices = {"doc_to_choice": ["<<J>>", "<<F>>, and"]} if kind == "multiple_choice" else {}
    return {
        "task": f"toy_{kind}",
        "custom_dataset": documents,
        "test_split": "test",
        "fewshot_split": "examples",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": kind,
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer" if choices else "{{answer}}",
        **choices,
    }


@pytest.fixture(autouse=True)
def without_the_machines_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the harness's results: it takes seconds."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


def _evaluate(model: PsykernLM | HFLM, task: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    how = {"num_fewshot": 2, "bootstrap_iters": 0, **arguments}
    results = lm_eval.simple_evaluate(model, tasks=[task or _task()], task_manager=manager, **how)
    assert results is not None
    return dict(results)


def _samples(results: dict[str, Any]) -> list[tuple[Any, list[float]]]:
    """Prompts, and what was answered."""
    (samples,) = results["samples"].values()
    return [(s["arguments"], [float(of[0][0]) for of in s["resps"]]) for s in samples]


@pytest.mark.parametrize("is_chat", [False, True], ids=["plain", "chat"])
def test_a_task_comes_to_the_same_as_with_hf(sides: Sides, is_chat: bool) -> None:
    """With a chat template examples are turns; this one refuses the system's."""
    how = {"apply_chat_template": is_chat, "fewshot_as_multiturn": is_chat}
    how |= {"system_instruction": "Choose."} if is_chat else {}
    got, expected = (_evaluate(model, **how) for model in (sides.ours, sides.theirs))
    ours, theirs = _samples(got), _samples(expected)
    assert [prompts for prompts, _ in ours] == [prompts for prompts, _ in theirs]
    shown = str(ours[0][0])
    assert ("[assistant]" in shown) == is_chat and "Choose" not in shown
    flat = [[value for _, values in side for value in values] for side in (ours, theirs)]
    assert flat[0] == pytest.approx(flat[1], rel=0, abs=CLOSE)
    assert got["results"] == expected["results"]
    for key in ("chat_template_sha", "tokenizer_bos_token", "tokenizer_eos_token", "max_length"):
        assert got.get(key) == expected.get(key)


def test_a_chat_template_is_given_its_arguments(sides: Sides) -> None:
    turns = [{"role": "user", "content": "Machine?"}]
    ours, theirs = sides.both(chat_template_args={"thinking": True}, enable_thinking=False)
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns) == "[user] Machine?[assistant] thinks "
    turns.append({"role": "assistant", "content": "You press"})
    assert ours.apply_chat_template(turns, False) == theirs.apply_chat_template(turns, False)


def test_answers_come_from_the_cache(sides: Sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _evaluate(_ours(sides.folder), use_cache=str(tmp_path / "cache"), predict_only=True)
    monkeypatch.setattr(Scorer, "token_logprobs", lambda *args, **kwargs: pytest.fail("something was computed"))
    again = _evaluate(_ours(sides.folder), use_cache=str(tmp_path / "cache"))
    assert _samples(again) == _samples(first)


def test_what_it_does_not_do_is_said(sides: Sides) -> None:
    with pytest.raises(PsykernError, match=r"\(toy_generate_until\): psykern scores .* multiple_choice, .* --model hf"):
        _evaluate(sides.ours, _task("generate_until"))
    for texts in [("You press", "")] if sides.ours.tok_encode("") else [("You press", ""), ("  ", "J")]:
        with pytest.raises(
            PsykernError, match="expected a context of at least one token and a continuation of 1 to 4,096"
        ):
            sides.ours.loglikelihood(_instances("loglikelihood", [texts]))
    with pytest.raises(PsykernError, match=r"requests: sequences\[0\]: 4,\d+ tokens.*the model reads 4,096"):
        _ours(sides.folder, max_length=9999).loglikelihood(_instances("loglikelihood", [("x " * 2100, "J")]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"logits_cache": True}, "does not know 'logits_cache'; it takes adapter, add_bos_token, .*wave_tokens"),
        ({"trust_remote_code": True}, "trust_remote_code: psykern runs no code"),
        ({"enable_thinking": True}, "enable_thinking: psykern does not generate"),
        ({"peft": "one", "adapter": "two"}, "peft and adapter are one thing, got one and two"),
    ],
)
def test_arguments_that_it_does_not_take_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(PsykernError, match=said):
        PsykernLM(str(demo.MODEL), **arguments)


@pytest.fixture
def without_others_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own tasks, whose thousands of files it reads for seconds."""

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)


@pytest.mark.usefixtures("without_others_tasks")
def test_the_command_runs_the_shipped_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    task = demo.MODEL.parent / "tasks" / "psykern_lotteries.yaml"
    arguments = [
        "--model_args",
        f"pretrained={demo.MODEL},device=cpu,wave_tokens=4096",
        "--tasks",
        str(task),
        "--num_fewshot",
        "2",
        "--limit",
        "40",
    ]
    assert cli.main(["lm-eval", *arguments, "--output_path", str(tmp_path / "out.json")]) == 0
    assert "psykern_lotteries" in capsys.readouterr().out
    assert sys.argv == ["pytest"]
    (file,) = tmp_path.glob("out*.json")
    results = json.loads(file.read_text())
    assert results["config"]["psykern_version"] == psykern.__version__
    assert results["results"]["psykern_lotteries"]["acc,none"] > 0.5  # the demo's model knows this task a little


def test_the_commands_errors_and_statuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["lm-eval", "--help"]) == 0
    assert "validate" in capsys.readouterr().out  # the harness's own help
    assert cli.main(["lm-eval", "--tasks", "x", "--nothing", "y"]) == 2
    assert "--nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "lm-eval" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "psykern.integrations.lm_eval")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["lm-eval", "--tasks", "x"]) == 1
    assert capsys.readouterr().err == (
        "psykern: error: lm-evaluation-harness is not installed: pip install 'psykern[lm-eval]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "handed_on"),
    [
        ("--tasks x", "run --model psykern --tasks x"),
        ("run --tasks x --model_args a=b", "run --model psykern --tasks x --model_args a=b"),
        ("--tasks x --model hf", "--tasks x --model hf"),
        ("run --model=hf", "run --model=hf"),
        ("-M hf -t x", "-M hf -t x"),
        ("ls tasks", "ls tasks"),
        ("run --help", "run --help"),
        ("", ""),
    ],
)
def test_the_model_is_psykern_unless_another_is_named(arguments: str, handed_on: str) -> None:
    assert integration._with_model(arguments.split()) == handed_on.split()
