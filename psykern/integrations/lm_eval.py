"""A model of psykern for lm-evaluation-harness, which calls it ``psykern`` once this module is imported.

>>> import lm_eval, psykern.integrations.lm_eval
>>> lm_eval.simple_evaluate("psykern", "pretrained=path/to/model,dtype=float32", tasks=["arc_easy"])

All requests of one kind are one trie: the options of a question share the question, and the examples that stand before
many questions are computed once. Which tokens a request has is the rule of the harness's own backend ``hf``: those of
AutoTokenizer, with its BOS policy, and cut at the left where longer than ``max_length``. The harness has no entry
points for models, so ``psykern lm-eval`` imports this and hands its arguments on.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from transformers import AutoConfig, AutoTokenizer

import psykern
from psykern.integrations.encoding import token_ids

_log = logging.getLogger("lm_eval.psykern")  # where the harness shows its own models' lines

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, the key of the harness's cache; context, rest


@register_model("psykern")
class PsykernLM(TemplateLM):
    """What ``--model psykern --model_args pretrained=…`` loads.

    pretrained: a model's folder or hub id. ``tokenizer``: of another folder or hub id. ``peft`` or ``adapter``: a LoRA
    adapter. ``max_length``: tokens of context; by default what the harness reads from the model's config.
    ``add_bos_token``: whether special tokens stand in front of a text; by default as the tokenizer has it.
    ``prefix_token_id``: in front of a text without context; by default the tokenizer's BOS, else its EOS.
    ``chat_template_args``, ``enable_thinking``: for the chat template. Everything else is an argument of
    :func:`psykern.load`: ``revision``, ``device``, ``dtype`` (``auto``: float32 on a CPU, bfloat16 on a GPU),
    ``backend``, ``wave_tokens``, ``batch_tokens``, …. ``batch_size`` has no effect. With ``peft`` the ``hf`` backend
    takes rows without a token out of the embedding, and so out of the softmax; here the model stays as it is.

    Raises PsykernError for an argument that is none of these, for ``trust_remote_code``, and what
    :func:`psykern.load` raises.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        peft: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool | None = False,
        **loading: Any,
    ) -> None:
        super().__init__()
        if trust_remote_code:
            raise psykern.PsykernError("trust_remote_code: psykern runs no code of a model's folder; leave it out")
        if enable_thinking:
            raise psykern.PsykernError("enable_thinking: psykern does not generate, so there is nothing to think")
        if peft is not None and loading.setdefault("adapter", peft) != peft:
            raise psykern.PsykernError(f"peft and adapter are one thing, got {peft} and {loading['adapter']}")
        if batch_size not in (None, 1, "1") or max_batch_size is not None:
            _log.info("batch_size has no effect: psykern computes all requests together")
        self.scorer = _load(pretrained, loading)
        folder = self.scorer.folder if peft else self.scorer.tokenizer_folder  # `hf` takes the base's with `peft`
        own = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or folder, trust_remote_code=False, **own)
        self.add_bos_token = add_bos_token
        config = AutoConfig.from_pretrained(self.scorer.folder, trust_remote_code=False)
        self.max_length = max_length or resolve_max_length(config, self.tokenizer)
        self._name = tokenizer or pretrained
        self._prefix = prefix_token_id
        self._template = dict(chat_template_args or {})
        if enable_thinking is not None:
            self._template["enable_thinking"] = enable_thinking
        self._ahead: dict[str, list[int]] = {}  # tokens of the texts of the call in hand

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> PsykernLM:
        """The harness always asks for a device; what ``--model_args`` say goes before it."""
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**(others | arg_dict))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> PsykernLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Raises PsykernError for a tokenizer that has no such token."""
        given = (self._prefix, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        token = next((token for token in given if token is not None), None)
        if token is None:
            raise psykern.PsykernError(f"{self._name}: the tokenizer has neither BOS nor EOS; give prefix_token_id")
        return int(token)

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how, **self._template))
        except TemplateError:
            _log.warning("the chat template refuses these turns; they are tried again without those of the system")
            turns = [turn for turn in chat_history if turn["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **how, **self._template))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        del kwargs
        if add_special_tokens is None:
            return self._ahead.get(string) or self._encode([string])[string]
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Each text's tokens. Special tokens are the tokenizer's own, those of ``add_bos_token``, or none in front of
        a text that begins with one."""
        prefix = self.tokenizer.decode(self.prefix_token_id)
        own = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        begun: tuple[list[str], list[str]] = ([], [])
        for text in texts:
            begun[text.startswith(prefix)].append(text)
        ids: dict[str, list[int]] = {}
        for own_texts, special in zip(begun, (own, {"add_special_tokens": False}), strict=True):
            ids |= token_ids(self.tokenizer, own_texts, special)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log P of each continuation after its context, in nats, and whether each of its tokens is the likeliest."""
        pairs = [request.args for request in requests if request.args[0]]
        # What the harness asks for pair by pair, most of it several times.
        self._ahead = self._encode(chain.from_iterable((a.rstrip(), a + b) for a, b in pairs))
        try:
            return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))
        finally:
            self._ahead = {}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log P of whole texts, in nats; those that are longer than ``max_length`` in windows that do not overlap."""
        del disable_tqdm
        texts = [request.args[0] for request in requests]
        encoded, windows, counts = self._encode(texts), [], []
        for text in texts:
            own = get_rolling_token_windows(encoded[text], self.prefix_token_id, self.max_length, context_len=1)
            disjoint: list[Request] = [(None, *make_disjoint_window(window)) for window in own]
            windows += disjoint
            counts.append(len(disjoint))
        values = iter(self._loglikelihood_tokens(windows))
        sums = [sum(next(values)[0] for _ in range(count)) for count in counts]
        for text, value in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises PsykernError."""
        del disable_tqdm
        tasks = ", ".join(sorted({str(request.task_name) for request in requests if request.task_name}))
        raise psykern.PsykernError(
            f"generate_until{f' ({tasks})' if tasks else ''}: psykern scores texts and does not generate them; choose "
            "tasks whose output_type is multiple_choice, loglikelihood or loglikelihood_rolling, or --model hf"
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        for texts, context, after in requests:
            self._check(texts, context, after)
        longest = self.max_length + 1  # the last token is not read
        sequences = [(context + after)[-longest:] for _, context, after in requests]
        if cut := sum(len(context) + len(after) > longest for _, context, after in requests):
            _log.warning("%d requests are longer than %d tokens: they are cut at the left", cut, self.max_length)
        starts = [len(ids) - len(after) for ids, (_, _, after) in zip(sequences, requests, strict=True)]
        try:
            scores = self.scorer.token_logprobs(sequences, starts) if sequences else []
        except ValueError as error:  # of `max_length` or of a tokenizer that are not the model's
            raise psykern.PsykernError(f"requests: {error}") from error
        answers = [(float(score.logprob.sum(dtype="float64")), bool(score.is_greedy.all())) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # None: a window of a longer text
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _check(self, texts: tuple[str, str] | None, context: list[int], after: list[int]) -> None:
        """Raises PsykernError for what has no log-probability."""
        if context and 0 < len(after) <= self.max_length:
            return
        shown = "" if texts is None else f" {texts[1][:40]!r} after {texts[0][-40:]!r}"
        raise psykern.PsykernError(
            f"request{shown}: expected a context of at least one token and a continuation of 1 to {self.max_length:,}, "
            f"got {len(context):,} and {len(after):,}; change the task's texts or max_length"
        )

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's file of results."""
        return {"model_name_or_path": self.scorer.name, "psykern_version": psykern.__version__}


def _load(pretrained: str, arguments: dict[str, Any]) -> psykern.Scorer:
    known = inspect.signature(psykern.load).parameters
    for name in arguments:
        if name not in known or name == "model":
            own = [of for of in inspect.signature(PsykernLM.__init__).parameters if of not in ("self", "loading")]
            names = ", ".join(sorted({*own, *known} - {"model"}))
            raise psykern.PsykernError(f"model_args: psykern does not know {name!r}; it takes {names}")
    if arguments.get("revision") is not None:
        arguments = arguments | {"revision": str(arguments["revision"])}  # the harness reads 123 as a number
    if str(arguments.get("device")).startswith("cuda") and not torch.cuda.is_available():
        _log.info("no CUDA device here: on the CPU")  # as `hf` does: the harness asks for cuda:0 where nobody else does
        arguments = arguments | {"device": "auto"}
    return psykern.load(str(pretrained), **arguments)


def run_harness(arguments: Sequence[str]) -> int:
    """The harness's command line with ``--model psykern``, unless ``arguments`` name another; the exit status."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *_with_model(list(arguments))]  # all that the harness reads them from
    try:
        cli_evaluate()
    except SystemExit as ended:  # of its parser
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return 0


def _with_model(arguments: list[str]) -> list[str]:
    """Other commands than ``run``, which is meant where none is named, have no model; the help is as it is."""
    options = arguments[1:] if arguments[:1] == ["run"] else arguments
    is_run = options is not arguments or (arguments[:1] != [] and arguments[0].startswith("-"))
    is_named = any(of == "--model" or of.startswith(("-M", "--model=")) for of in options)
    if not is_run or is_named or {"-h", "--help"} & set(options):
        return arguments
    return ["run", "--model", "psykern", *options]
