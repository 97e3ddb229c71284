"""In which order cells are run: so that a sweep stopped half way still tells something."""

from collections.abc import Iterator, Sequence

from scaling.tasks import Task
from unitransformer.config import RunConfig
from unitransformer.flops import count_flops


def in_order(tasks: Sequence[Task]) -> list[Task]:
    """Each repeat of all cells before the next one. In a repeat first the refusals, which cost
    nothing; then the cheapest cells that show a value of an axis not seen yet; then by cost."""
    repeats = sorted({task.repeat for task in tasks})
    return [
        task for repeat in repeats for task in _of_one([t for t in tasks if t.repeat == repeat])
    ]


def _of_one(tasks: Sequence[Task]) -> Iterator[Task]:
    yield from (task for task in tasks if task.config is None)
    left = sorted((task for task in tasks if task.config is not None), key=_cost)
    seen: set[tuple[str, str, str]] = set()
    later = []
    for task in left:
        shown = {(task.cell.recipe, name, value) for name, value in task.cell.options.items()}
        if shown <= seen:
            later.append(task)
        else:
            seen |= shown
            yield task
    yield from later


def _cost(task: Task) -> tuple[float, str]:
    assert task.config is not None
    return train_flops(task.config), task.name


def train_flops(config: RunConfig) -> float:
    """Matrix products of a whole training, over all devices, what is computed again included."""
    units = config.global_batch_size * config.tokens_per_sample
    return count_flops(config)["hardware"] * units * config.max_steps
