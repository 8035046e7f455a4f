"""Follows a simulated participant trial by trial: what did the model expect, and what did the participant do?

The participant plays two slot machines and stays with one that paid, most of the time. A session keeps what the model
has read, so that each trial costs only its own tokens.
"""

from __future__ import annotations

import random

import psykern
from psykern import demo

INSTRUCTIONS = "There are two machines, A and B. On each trial you choose one of them.\n"
PAYS = {"A": 0.8, "B": 0.3}  # how often
NUM_TRIALS = 12


def main(seed: int = 0) -> None:
    rng = random.Random(seed)
    machine, nll = "B", 0.0
    with psykern.load(demo.MODEL) as scorer:
        session = scorer.session(INSTRUCTIONS)
        for trial in range(1, NUM_TRIALS + 1):
            session.append("You press <<")
            expected = session.choose(["A", "B"])  # nothing is added to the session
            won = rng.random() < PAYS[machine]
            nll -= expected.log_softmax["AB".index(machine)]
            print(f"trial {trial:2}: the model expects {expected.option} by {expected.margin:.2f} nats", end="; ")
            print(f"the participant presses {machine} and {'wins' if won else 'loses'}")
            session.append(f"{machine}>>. You get {int(won)} points.\n")
            if not won or rng.random() < 0.1:
                machine = "B" if machine == "A" else "A"
    print(f"mean NLL of a choice: {nll / NUM_TRIALS:.3f} nats; guessing has 0.693")


if __name__ == "__main__":
    main()
