"""Makes the demo's sample and its tiny model: ``python -m psykern.demo.train SHARED_PSYCH_FOLDER``.

The rule: of each study the transcripts whose text has the smallest SHA-256 are the sample; a row is training data only
if neither its text nor its participant is in the sample. Tokenizer and model see training data alone. Rows of the
sample are the original bytes with one field added, ``options``, read off the text by the study's rule.

The loss of a step is the mean over the tokens between the marks plus the mean over all other tokens (nats), so that the
few response tokens weigh as much as the prose around them. Where the data's letters were drawn at random for each
participant, they are drawn anew at every use.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from psykern.demo import MODEL, SAMPLE

Options = list[str] | list[list[str]] | None  # one list for all responses, or one for each; None: open responses

SEED = 201
STEPS = 900
PEAK_LR = 3e-3
VOCAB_SIZE = 2560
CONTEXT = 6144  # tokens; the longest transcript has 5,7xx
RESPONSE = re.compile(r"<<(.*?)>>", re.DOTALL)
# Qwen's pre-tokenizer: " <<" and ">>" are words of their own, digits stand alone.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Study:
    """One study of the demo."""

    name: str
    num_sample: int  # transcripts in the sample
    share: float  # of the training steps
    batch: int  # transcripts per step
    options: Callable[[str], Options]
    letters: str | None = None  # pattern whose one-letter groups are redrawn at every use


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a study's file."""

    line: bytes  # without the line break
    key: tuple[str, str]  # experiment, participant
    text: str


def ab_options(text: str) -> Options:
    """The two lotteries that the instructions name."""
    return list(re.findall(r"between lottery (\w) and lottery (\w)", text)[0])


def key_options(text: str) -> Options:
    """The keys of the slot machines, "1 to 6"."""
    first, last = re.findall(r"represented by the keys (\d) to (\d)", text)[0]
    return [str(key) for key in range(int(first), int(last) + 1)]


def named_options(pattern: str) -> Callable[[str], Options]:
    """A rule: the letters that ``pattern`` finds in the text between one response and the next."""

    def options(text: str) -> Options:
        trials = RESPONSE.split(text)[:-1:2]  # the text before each response
        found = [[letter for hit in re.findall(pattern, trial, re.M) for letter in hit] for trial in trials]
        return found[0] if all(letters == found[0] for letters in found) else found

    return options


def no_options(text: str) -> Options:
    """Open responses."""
    return None


STUDIES = (
    Study("frey2017mpl", 3, 0.10, 1, ab_options),
    Study("jagadish2023zero", 2, 0.06, 1, key_options),
    Study("thoma2025riskychoice", 10, 0.22, 4, named_options(r"marked '(\w)' or marked '(\w)'"), r"'(\w)'|<<(\w)>>"),
    Study("franke2024bayesian", 10, 0.40, 4, named_options(r"^(\w): "), r"^(\w): |<<(\w)>>"),
    Study("guenther2024substitutions", 6, 0.22, 3, no_options),
)


def read(folder: Path, study: Study) -> list[Row]:
    """All rows of a study that hold a response."""
    lines = gzip.decompress((folder / f"{study.name}.jsonl.gz").read_bytes()).splitlines()
    rows = [(line, json.loads(line)) for line in lines]
    return [
        Row(line, (str(row["experiment"]), str(row["participant"])), row["text"])
        for line, row in rows
        if RESPONSE.search(row["text"])
    ]


def split(rows: list[Row], num_sample: int) -> tuple[list[Row], list[Row]]:
    """Sample and training rows, which share no text and no participant."""
    by_text = {row.text: row for row in reversed(rows)}
    order = sorted(by_text, key=lambda text: hashlib.sha256(text.encode()).digest())
    sample = [by_text[text] for text in order[:num_sample]]
    texts, keys = {row.text for row in sample}, {row.key for row in sample}
    return sample, [row for row in rows if row.text not in texts and row.key not in keys]


def with_options(row: Row, study: Study) -> bytes:
    """The row's own bytes, with the field ``options`` added where responses are closed."""
    options = study.options(row.text)
    if options is None:
        return row.line
    return row.line.rstrip()[:-1] + b', "options": ' + json.dumps(options).encode() + b"}"


def reletter(text: str, pattern: str, rng: random.Random) -> str:
    """The text with its own letters permuted, in the places that ``pattern`` names."""
    letters = sorted({match[match.lastindex or 0] for match in re.finditer(pattern, text, re.M)})
    drawn = dict(zip(letters, rng.sample(letters, len(letters)), strict=True))

    def replace(match: re.Match[str]) -> str:
        letter = match[match.lastindex or 0]
        return match[0].replace(letter, drawn[letter])

    return re.sub(pattern, replace, text, flags=re.M)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE over the texts, cut behind every mark so that no merge reaches across ``<<`` or ``>>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for text in texts for piece in re.split(r"(?<=<<)|(?=>>)|(?<=>>)", text))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and whether each token overlaps a response, [T] int64 and [T] bool."""
    encoding = tokenizer.encode(text)
    is_response = torch.zeros(len(encoding.ids), dtype=torch.bool)
    for match in RESPONSE.finditer(text):
        start, end = match.span(1)
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
        is_response[first : last + 1] = start < end
    return torch.tensor(encoding.ids), is_response


def batch_loss(
    model: Qwen3ForCausalLM, encoded: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of the text tokens and of the response tokens of a batch, padded on the right."""
    longest = max(len(ids) for ids, _ in encoded)
    input_ids = torch.zeros(len(encoded), longest, dtype=torch.int64)
    kind = torch.full((len(encoded), longest), -1)  # -1 padding, 0 text, 1 response
    for i, (ids, is_response) in enumerate(encoded):
        input_ids[i, : len(ids)] = ids
        kind[i, : len(ids)] = is_response.long()
    logits = model(input_ids=input_ids).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    kind = kind[:, 1:].flatten()
    return losses[kind == 0].mean(), losses[kind == 1].mean()
