"""Writes the record of a run whose ranks could not: `python -m recipes.service.failure_record`.

    python -m recipes.service.failure_record gpt ERRORS SINCE -- options of the recipe

ERRORS is the folder in which each failed rank has left a file, as `unitransformer.launch.launcher`
reads them. SINCE is the clock time at which the ranks were started. Prints the first failure.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.command_line import configure
from recipes.service.plan import PRESETS


def main(argv: Sequence[str]) -> int:
    """Writes the record; returns the exit code."""
    from unitransformer.launch.failures import first_failure, read_failures
    from unitransformer.recording import record_failure

    recipe, errors, since_s, _, *arguments = argv
    failures = read_failures(Path(errors))
    if not failures:
        return 0
    failure = first_failure(failures)
    config, paths = configure(PRESETS[recipe], arguments)
    command = f"python -m recipes.{recipe} {shlex.join(arguments)}".strip()
    record_failure(config, failure, paths.record, command=command, since_s=float(since_s))
    print(json.dumps({"rank": failure.rank, "message": failure.message}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
