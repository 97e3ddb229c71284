"""Times small steps of known work in turn: `python -m scaling.comparison.work ROUNDS SEED`.

A step is a number of equal matrix products, so that a step with 5 % more of them does 5 % more
FLOPs, whatever the machine does meanwhile. Prints a line of JSON: the seconds of each arm in each
round, by clock. Each round runs every arm once, in random order.
"""

import json
import random
import sys
import time

PRODUCTS = {"base": 2000, "equal": 2000, "2 %": 2040, "5 %": 2100}  # by arm
SIZE = 64  # rows and columns of the matrices
WARM_UP = 20  # rounds


def measure(rounds: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Returns the seconds of each round, by clock and arm."""
    import numpy as np

    generator = np.random.default_rng(seed)
    left, right = generator.random((2, SIZE, SIZE), dtype=np.float32)
    result, order = np.empty_like(left), random.Random(seed)
    taken = {clock: {arm: list[float]() for arm in PRODUCTS} for clock in ("processor", "wall")}
    for number in range(-WARM_UP, rounds):
        for arm in order.sample(list(PRODUCTS), len(PRODUCTS)):
            wall_s, processor_s = time.perf_counter(), time.process_time()
            for _ in range(PRODUCTS[arm]):
                np.matmul(left, right, out=result)
            processor_s, wall_s = time.process_time() - processor_s, time.perf_counter() - wall_s
            if number >= 0:
                taken["processor"][arm].append(processor_s)
                taken["wall"][arm].append(wall_s)
    return taken


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))) + "\n")
