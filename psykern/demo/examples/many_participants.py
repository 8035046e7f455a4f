"""Lets the model be 50 participants at once: each choice is drawn from what the model gives its options.

All sessions advance together. What they have in common (here the instructions) is computed once.
"""

from __future__ import annotations

import numpy as np

import psykern
from psykern import demo

INSTRUCTIONS = "There are two machines, A and B. On each trial you choose one of them.\n"
OPTIONS = ("A", "B")
PAYS = (0.8, 0.3)
NUM_PARTICIPANTS, NUM_TRIALS = 50, 10


def main(seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    share_of_a = []
    with psykern.load(demo.MODEL) as scorer:
        sessions = [scorer.session(INSTRUCTIONS) for _ in range(NUM_PARTICIPANTS)]
        texts = ["You press <<"] * NUM_PARTICIPANTS
        for _ in range(NUM_TRIALS):
            choices = psykern.step(sessions, texts, options=OPTIONS)
            pressed = [int(rng.choice(2, p=np.exp(choice.log_softmax))) for choice in choices]
            points = [int(rng.random() < PAYS[option]) for option in pressed]
            share_of_a.append(1 - np.mean(pressed))
            texts = [
                f"{OPTIONS[option]}>>. You get {won} points.\nYou press <<"
                for option, won in zip(pressed, points, strict=True)
            ]
    print(f"{NUM_PARTICIPANTS} simulated participants; share that pressed A, the better machine, on each trial:")
    print(" ".join(f"{share:.2f}" for share in share_of_a))


if __name__ == "__main__":
    main()
