"""Chat templates: where responses stand, what is refused, and the study's rule by a few lines of its own."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rows import accepted, find
from support.tiny import branches, build_tiny, encode, scored, transcript, words
from transformers import AutoTokenizer

from psykern.core.errors import CheckpointError, RowError
from psykern.core.settings import Settings
from psykern.core.types import Transcript
from psykern.data.chat import ChatTemplate, _Turn
from psykern.data.encode import Encoder
from psykern.data.protocol import study_text
from psykern.data.read import read
from psykern.data.tokenizer import Tokenizer

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TRIMS = PLAIN.replace("m.content", "m.content | trim")
BOS = "<bos>" + PLAIN
# In the style of Llama 3.2's: the day stands in front unless the caller names one.
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|system|>Cutting Knowledge Date: December 2023\nToday Date: " + date_string + "<|end|>" }}
{%- for m in messages %}
    {{- "<|" + m.role + "|>" + m.content | trim + "<|end|>" }}
{%- endfor %}
"""
MACRO = "{% macro day(of) %}{% if true %}{{ strftime_now(format=of) }}{% endif %}{% endmacro %}{{ day('%Y-%m-%d') }}"
ON_A_BRANCH = "{% if messages | length > 3 %}{{ strftime_now('%A, %-d %B %Y') }}{% endif %}"
TEXT = "You press <<J>>. You win.\nYou press <<>> and <<J>>, then<<a b>>"
RESPONSES = ["J", "", "J", "a b"]


def folder_with(
    path: Path, template: str | None, file: str = "tokenizer_config.json", bos: bool = False, **more: Any
) -> Path:
    """A tokenizer's folder whose chat template stands in ``file``; its tokenizer_config.json says ``more``."""
    path.mkdir(exist_ok=True)
    tokenizer = build_tiny(bos=bos)
    tokenizer.add_special_tokens(["<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} | more
    if template is not None and file == "tokenizer_config.json":
        config["chat_template"] = template
    elif template is not None:
        (path / file).write_text(template if file.endswith("jinja") else json.dumps({"chat_template": template}))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def chat(tmp_path: Path) -> Callable[[str], ChatTemplate]:
    return lambda template: ChatTemplate.load(folder_with(tmp_path, template))


@pytest.fixture(scope="module")
def qwen(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The real tokenizer and template of Qwen3 or Qwen2.5."""

    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        shutil.copyfile(shared / "tokenizers" / "qwen3" / "tokenizer.json", path / "tokenizer.json")
        config = {"qwen3": "qwen3/tokenizer_config.json", "qwen2.5": "qwen2/qwen2.5-instruct_tokenizer_config.json"}
        shutil.copyfile(shared / "tokenizers" / config[name], path / "tokenizer_config.json")
        return path

    return folder


def at_marks(rendered: Transcript) -> list[str]:
    return [rendered.text[a:b] for a, b in rendered.responses_char.tolist()]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json"])
def test_the_template_is_found_in(file: str, tmp_path: Path) -> None:
    rendered = ChatTemplate.load(folder_with(tmp_path, PLAIN, file)).render(transcript("a <<b>>"))
    assert rendered.text == "<|user|>a <|end|><|assistant|>b<|end|>"
    assert at_marks(rendered) == ["b"]


def test_a_processors_template_must_make_the_same_of_text(tmp_path: Path) -> None:
    """Of a model that sees: it may treat images otherwise."""
    folder = folder_with(tmp_path, PLAIN)
    for_images = "{% if messages[0].content is not string %}<image>{% endif %}" + PLAIN
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": for_images}))
    assert ChatTemplate.load(folder).source == PLAIN
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "You see. " + PLAIN}))
    with pytest.raises(
        CheckpointError, match=r"chat_template.json is not the tokenizer's: .* got 'You see\. <\|user.* rem"
    ):
        ChatTemplate.load(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ no( }}"}))
    with pytest.raises(CheckpointError, match="its chat template"):
        ChatTemplate.load(folder)


def test_repeated_and_empty_responses_are_located(chat: Callable[[str], ChatTemplate]) -> None:
    rendered = chat(PLAIN).render(transcript(TEXT))
    assert at_marks(rendered) == RESPONSES
    starts = rendered.responses_char[:, 0].tolist()
    assert all(rendered.text[:start].endswith("<|assistant|>") for start in starts)
    assert starts == sorted(set(starts))


def test_text_outside_the_marks_may_be_trimmed(chat: Callable[[str], ChatTemplate]) -> None:
    rendered = chat(TRIMS).render(transcript(TEXT))
    assert rendered.text.startswith("<|user|>You press<|end|><|assistant|>J<|end|><|user|>. You win.\nYou press<|end|>")
    assert at_marks(rendered) == RESPONSES


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        (TRIMS, "a << b>>", "strips white space from a response"),
        (PLAIN.replace("messages", "messages[:2]"), "a <<b>> c", "drops turn 3 of 3"),
        (PLAIN.replace("messages", "messages | reverse"), "a <<b>> c", "repeats or reorders the turns of 3"),
        (
            PLAIN.replace("m.content", "m.content | replace('b', 'x')"),
            "a <<b>> c",
            r"turn 2 \(assistant\): .* 'b', got 'x'",
        ),
        (PLAIN.replace("m.content", "m.content[:20]"), f"a <<{'b' * 21}>>", r"changes a content: turn 2 \(assistant\)"),
        ("{{ raise_exception('roles must alternate') }}", "a <<b>>", "refuses the turns: roles must alternate"),
    ],
    ids=["strips", "drops", "reorders", "replaces", "cuts", "raises"],
)
def test_a_template_that_changes_contents_is_refused(
    chat: Callable[[str], ChatTemplate], template: str, text: str, message: str
) -> None:
    """By its hash, not by its folder: another folder's run takes the message from a token cache."""
    digest = hashlib.sha256(template.encode()).hexdigest()[:8]
    with pytest.raises(RowError, match=f"file.jsonl:1: the chat template sha256:{digest}… .*{message}"):
        chat(template).render(transcript(text))


def test_thinking_is_off_where_the_template_knows_it(chat: Callable[[str], ChatTemplate]) -> None:
    template = "{% if enable_thinking is not defined or enable_thinking %}think!{% endif %}" + PLAIN
    assert chat(template).render(transcript("a <<b>>")).text.startswith("<|user|>a ")


@pytest.mark.parametrize(
    ("template", "printed"),
    [
        (LLAMA, "Today Date: 03 Jan 2026<|end|>"),
        (LLAMA.replace("strftime_now", "no_such_thing"), "Today Date: 26 Jul 2024<|end|>"),
        (MACRO + PLAIN, "2026-01-03<|user|>"),
        (ON_A_BRANCH + PLAIN, "Saturday, 3 January 2026<|user|>"),
        ("{% generation %}{{ strftime_now('%d/%m') }}{% endgeneration %}\n" + PLAIN, "03/01"),
        ("{% for m in messages if strftime_now is defined %}{{ m.content | tojson }}{% break %}{% endfor %}", '"You'),
        (PLAIN, "<|user|>You press"),
    ],
    ids=["llama", "own-default", "macro", "branch", "generation", "loop-control", "none"],
)
def test_texts_are_those_of_transformers_on_the_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, printed: str
) -> None:
    """With its clock put to that day."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 1, 3, 17, 30)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Stopped)
    folder = folder_with(tmp_path, template, bos=True, bos_token="<bos>")
    turns = [_Turn(("user", "assistant")[i % 2], text, -1) for i, text in enumerate(["You press", "J", "or", "F"])]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    got = ChatTemplate.load(folder).at("2026-01-03")._apply(turns)
    assert got == wanted and printed in got


def test_what_asks_for_the_date_needs_one(chat: Callable[[str], ChatTemplate]) -> None:
    asking = (LLAMA, MACRO + PLAIN, ON_A_BRANCH + PLAIN)
    assert [chat(template).asks_for_date for template in (*asking, PLAIN, TRIMS)] == [True] * 3 + [False] * 2
    with pytest.raises(RowError, match="refuses the turns: date: expected the run's, got None"):
        chat(LLAMA).render(transcript("a <<b>>"))
    one, two = (chat(LLAMA).at(day).render(transcript("a <<b>>")) for day in ("2026-01-03", "2026-01-04"))
    assert at_marks(one) == at_marks(two) == ["b"]
    assert one.text.replace("03 Jan", "04 Jan") == two.text != one.text


@pytest.mark.parametrize("chance", ["{{ ['a', 'b'] | random }}", "{% set x = 'ab' | random %}"])
def test_a_template_that_draws_by_lot_is_refused(chat: Callable[[str], ChatTemplate], chance: str) -> None:
    with pytest.raises(CheckpointError, match="its chat template cannot be used: No filter named 'random'"):
        chat(chance + PLAIN).at(None)


@pytest.mark.parametrize("chance", ["{{ lipsum() }}", "{{ [['a', 'b']] | map('random') | first }}"])
def test_a_row_that_would_be_drawn_by_lot_is_refused(chat: Callable[[str], ChatTemplate], chance: str) -> None:
    with pytest.raises(RowError, match=r"refuses the turns: ('lipsum' is undefined|No filter named 'random')"):
        chat(chance + PLAIN).at(None).render(transcript("a <<b>>"))


def test_a_template_stays_in_its_sandbox(chat: Callable[[str], ChatTemplate]) -> None:
    for escape in ("{{ strftime_now.__globals__.keys() }}", "{{ messages.append(1) }}"):
        with pytest.raises(RowError, match=r"refuses the turns: .*unsafe"):
            chat(escape + PLAIN).at("2026-01-03").render(transcript("a <<b>>"))


def test_special_tokens_that_a_template_names_are_in_its_hash(tmp_path: Path) -> None:
    """Two folders with one template and one tokenizer.json may give other prompts."""

    def hash_of(name: str, template: str, **config: str) -> str:
        return ChatTemplate.load(folder_with(tmp_path / name, template, bos=True, **config)).hash

    named = {hash_of(f"n{i}", LLAMA, bos_token=bos) for i, bos in enumerate(("<bos>", "<|end|>", "<bos>"))}
    assert len(named) == 2
    alike = {hash_of(f"u{i}", LLAMA, bos_token="<bos>", eos_token=eos) for i, eos in enumerate(("<|end|>", "<|user|>"))}
    assert len(alike) == 1 and alike < named  # it does not say eos_token
    own = {hash_of(f"p{i}", PLAIN, bos_token=bos) for i, bos in enumerate(("<bos>", "<|end|>"))}
    assert own == {f"sha256:{hashlib.sha256(PLAIN.encode()).hexdigest()}"}


def test_no_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="condition chat needs a chat template"):
        ChatTemplate.load(folder_with(tmp_path, None))


def test_the_templates_own_special_tokens_are_not_doubled(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, BOS, bos=True)
    chat, tokenizer = ChatTemplate.load(folder), Tokenizer.load(folder)
    of = transcript("a <<b>> c")
    exact = encode(tokenizer, of, chat, condition="chat")
    assert words(tokenizer, exact.token_ids) == ["<bos>", "<|user|>", "a", " ", "<|end|>", "<|assistant|>", "b"]
    study = encode(tokenizer, of, chat, condition="chat", protocol="study")
    assert words(tokenizer, study.token_ids)[:3] == ["<bos>", "<bos>", "<|user|>"]  # as the study has it


def test_options_stand_in_the_responses_place(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, PLAIN)
    tokenizer = Tokenizer.load(folder)
    for protocol in ("exact", "study"):
        of = transcript("say <<1>> or <<12>>.", ("1", "12"))
        encoded = encode(tokenizer, of, ChatTemplate.load(folder), condition="chat", protocol=protocol)
        assert encoded.flags == ("closing_mark", "closing_mark")
        for r, parent, first, ids in branches(encoded):
            before = words(tokenizer, encoded.token_ids[:parent])
            assert before[-1] == "<|assistant|>" and first == 0
            assert "".join(words(tokenizer, ids)) in ("1<|end|>", "12<|end|>")
            assert parent == encoded.spans_tok[r, 0]


THINKS = PLAIN.replace("m.content", "m.content.split('</think>')[-1]")  # as Qwen 3's and R1's do


@pytest.mark.parametrize(
    ("template", "options", "which"),
    [
        (TRIMS, ("J", " F"), r'2 \(" F"\)'),
        (TRIMS, ("J\n", "F"), r'1 \("J\n"\)'),
        (THINKS, ("J", "<think></think>F"), r'2 \("<think></think>F"\)'),
    ],
)
def test_an_option_that_the_template_would_change_is_refused(
    template: str, options: tuple[str, ...], which: str, tmp_path: Path
) -> None:
    """The branch would hold characters that no chat of this template has behind an assistant's header."""
    folder = folder_with(tmp_path, template)
    tokenizer, chat = Tokenizer.load(folder), ChatTemplate.load(folder)
    row = transcript("say <<J>> or <<J>>.", (("J", "F"), options))
    with pytest.raises(RowError, match=f"^file.jsonl:1: the chat template .* strips or changes option {which} of r"):
        encode(tokenizer, row, chat, condition="chat")
    assert encode(tokenizer, row).options == (("J", "F"), options)  # in plain text it stands
    observing = Encoder(tokenizer, Settings(condition="chat", options="observed-experiment"), chat)
    (encoded,) = observing.encode([transcript("<<J>>")], {("study", "experiment"): ("X", *options)}).transcripts
    assert encoded.options == (("X", *(option for option in options if option in ("J", "F"))),)


def test_the_study_strips_options_as_the_template_does_responses(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TRIMS)
    tokenizer, chat = Tokenizer.load(folder), ChatTemplate.load(folder)
    encoded = encode(tokenizer, transcript("say <<J>>.", (" J", " F")), chat, condition="chat", protocol="study")
    assert [words(tokenizer, ids[first:]) for _, _, first, ids in branches(encoded)] == [["J"], ["F"]]
    assert encoded.option_index.tolist() == [0]


def test_options_that_nothing_tells_apart_reject_the_row(tmp_path: Path) -> None:
    """Behind the last response this template puts nothing: P("1") would hold P("12")."""
    folder = folder_with(tmp_path, "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    tokenizer, chat = Tokenizer.load(folder), ChatTemplate.load(folder)
    encode(tokenizer, transcript("say <<1>>.", ("1", "12")), chat, condition="chat")
    with pytest.raises(RowError, match=r'tokens of option 2 \("1"\) of response 1 begin those of option 1 \("12"\)'):
        encode(tokenizer, transcript("say <<1>>", ("12", "1")), chat, condition="chat")


def test_the_encoder_needs_a_template_for_chat_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder_with(tmp_path, PLAIN))
    with pytest.raises(ValueError, match="chat: expected a template for condition chat"):
        Encoder(tokenizer, Settings(condition="chat"))
    with pytest.raises(ValueError, match="for condition chat and no other, got 'plain'"):
        Encoder(tokenizer, Settings(), ChatTemplate.load(tmp_path))


STUDIES = (
    "alsobay2025publicGoodsGame",
    "haridi2024memory",
    "little2024functionestimation",
    "guenther2024substitutions",
)
STUDIES += ("schiekiera2025metascience", "vantiel2021probabilistic_pragmatics")


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5"])
def test_real_transcripts_in_real_templates(shared: Path, qwen: Callable[[str], Path], name: str) -> None:
    """Turn by turn by hand: these two templates put a header in front of a content and a mark behind it."""
    folder = qwen(name)
    chat, tokenizer = ChatTemplate.load(folder), Tokenizer.load(folder)
    system = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    for of in some(shared, STUDIES):
        own = re.split("<<|>>", of.text)
        roles = [("assistant" if i % 2 else "user", text) for i, text in enumerate(own)]
        turns = [(role, text) for role, text in roles if text or role == "assistant"]
        whole = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
        if name == "qwen3" and not own[-1]:
            head, tail = whole.rsplit("<|im_start|>assistant\n", 1)
            whole = f"{head}<|im_start|>assistant\n<think>\n\n</think>\n\n{tail}"
        expected = tokenizer.backend.encode((system if name == "qwen2.5" else "") + whole, add_special_tokens=False).ids
        encoded = encode(tokenizer, of, chat, condition="chat")
        assert encoded.token_ids.tolist() == expected[: len(encoded.token_ids)]
        assert ["".join(parts) for parts in scored(tokenizer, encoded)] == own[1::2]


def test_a_last_response_stands_behind_the_empty_thought(qwen: Callable[[str], Path]) -> None:
    folder = qwen("qwen3")
    tokenizer = Tokenizer.load(folder)
    encoded = encode(tokenizer, transcript("a <<b>> c <<think>>"), ChatTemplate.load(folder), condition="chat")
    assert scored(tokenizer, encoded) == [["b"], ["think"]]
    start = int(encoded.spans_tok[1, 0])
    assert words(tokenizer, encoded.token_ids[start - 4 : start]) == ["<think>", "\n\n", "</think>", "\n\n"]


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5"])
def test_the_studys_rule_on_real_transcripts(shared: Path, qwen: Callable[[str], Path], name: str) -> None:
    folder = qwen(name)
    tokenizer, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    chat = ChatTemplate.load(folder)
    rng = np.random.default_rng(0)
    odd = "Start <<-5>> then <<skip>>, <<>> and <<More Details >> again <<a>>\n<<b>><<c >> <<think>>"
    every = [*some(shared, STUDIES), transcript(odd), transcript("".join(rng.choice(["<<a>>", " x", "\n"], 40)))]
    for of in every:
        ids, runs = by_the_studys_rule(theirs, of.text)
        encoded = encode(tokenizer, of, chat, condition="chat", protocol="study")
        assert encoded.token_ids.tolist() == ids[: len(encoded.token_ids)]
        assert [list(range(a, b)) for a, b in encoded.spans_tok.tolist()] == runs


def by_the_studys_rule(tokenizer: Any, text: str) -> tuple[list[int], list[list[int]]]:
    """Tokens and scored runs: turns change at every mark, and the header and what ends a turn are known by sight."""
    turns: list[dict[str, str]] = []
    role = "user"
    for piece in re.findall("<<|>>|(?:(?!<<|>>).)+", f"{study_text(text)}.", re.DOTALL):
        if piece == "<<":
            if turns and turns[-1].get("open"):  # a response whose closing mark a patch took is said by the user
                turns[-1]["role"] = "user"
            role = "assistant"
        elif piece == ">>":
            turns = [{k: v for k, v in turn.items() if k != "open"} for turn in turns]
            role = "user"
        else:
            turns.append({"role": role, "content": piece} | ({"open": "yes"} if role == "assistant" else {}))
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)).input_ids
    begin = tokenizer("<|im_start|>assistant\n").input_ids
    end = tokenizer("<|im_end|>\n<|im_start|>user\n").input_ids
    runs, place = [], 0
    while place < len(ids):
        if ids[place : place + len(begin)] != begin:
            place += 1
            continue
        place += len(begin)
        run = []
        while place < len(ids) and ids[place : place + len(end)] != end:
            run.append(place)
            place += 1
        place += len(end)
        if run:
            runs.append(run)
    return ids, runs


def some(shared: Path, studies: tuple[str, ...], count: int = 2) -> Iterator[Transcript]:
    for study in studies:
        yield from accepted(read(find(shared / "psych" / f"{study}.jsonl.gz"), limit=count))
