"""Surprisal of each word of a sentence, in bits, as studies of reading times use it."""

from __future__ import annotations

import psykern
from psykern import demo

SENTENCE = "You press the key when the light turns green, and you get a point."


def main() -> None:
    with psykern.load(demo.MODEL) as scorer:
        scored = scorer.surprisal(SENTENCE, start="Instructions:")  # is read, not reported
    print("word           bits  tokens  characters")
    columns = (scored.words, scored.word_bits, scored.word_num_tokens, scored.word_offsets.tolist())
    for word, bits, tokens, (first, stop) in zip(*columns, strict=True):
        print(f"{word:<12} {bits:6.1f}  {tokens:6}  {first}-{stop}")


if __name__ == "__main__":
    main()
