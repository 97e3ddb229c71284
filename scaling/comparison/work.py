"""Times small steps of known work in turn: `python -m scaling.comparison.work ROUNDS SEED`.

A step is a number of equal matrix products, so that a step with 5 % more of them does 5 % more
FLOPs, whatever the machine does meanwhile. Prints a line of JSON: the seconds of each arm in each
round, by clock. In each round the arms take turns, in random order each time.
"""

import json
import random
import sys
import time

PRODUCTS = {"base": 100, "equal": 100, "2 %": 102, "5 %": 105}  # of a turn, by arm
TURNS = 5  # of each arm in a step: the shorter the turns, the more alike the machine is for all
SIZE = 32  # rows and columns of the matrices
WARM_UP = 20  # rounds


def measure(rounds: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of each round, by clock and arm."""
    import numpy as np

    generator = np.random.default_rng(seed)
    left, right = generator.random((2, SIZE, SIZE), dtype=np.float32)
    result, order = np.empty_like(left), random.Random(seed)
    taken = {clock: {arm: list[float]() for arm in PRODUCTS} for clock in ("processor", "wall")}
    for _ in range(WARM_UP + rounds):
        for of_clock in taken.values():
            for seconds in of_clock.values():
                seconds.append(0.0)
        for _ in range(TURNS):
            for arm in order.sample(list(PRODUCTS), len(PRODUCTS)):
                wall_s, processor_s = time.perf_counter(), time.process_time()
                for _ in range(PRODUCTS[arm]):
                    np.matmul(left, right, out=result)
                taken["processor"][arm][-1] += time.process_time() - processor_s
                taken["wall"][arm][-1] += time.perf_counter() - wall_s
    return {
        clock: {arm: seconds[WARM_UP:] for arm, seconds in of_clock.items()}
        for clock, of_clock in taken.items()
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))) + "\n")
