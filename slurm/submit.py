"""Submits a batch job to SLURM. Imports nothing heavy, for use on a login node.

    python -m slurm.submit recipes.gpt --nodes 2 --devices 8 -- --size 1.3b --max-steps 5000
    python -m slurm.submit sweep node-8 --max-parallel 4 -- --retry oom

Exit code: 0 submitted; 2 refused by this command or by SLURM, with nothing queued or written.
"""

import sys
from collections.abc import Sequence

import jsonargparse

from slurm import scheduler
from slurm.batch_script import Job, render
from slurm.job_options import TARGETS, build_jobs, build_parser, parse
from slurm.preflight import plan_on
from slurm.refusals import check_types
from slurm.runtime.allocation import option_of
from slurm.sbatch import check_with_slurm, submit
from slurm.sweep_jobs import find_short_arrays, table_of
from slurm.sweep_queue import how_arrays_wait, missing_arrays, queued_arrays, submit_sweep
from unitransformer.cli import explain_parse_error, fail, only_reports, run_main

WARNING = "warning: "  # begins a line of a plan that a person must see


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, prints or submits a job; returns the exit code."""
    try:
        options, arguments = parse(sys.argv[1:] if argv is None else argv)
        jobs = build_jobs(options, arguments)
        if not jobs:
            print("every cell of this sweep is finished; nothing was submitted")
            return 0
        is_sweep = options.target == "sweep"
        if options.dry_run:
            plan = _plan_of(jobs, options)
            print(plan)
            for line in plan.splitlines():
                if line.startswith(f"# {WARNING}"):  # a script in a file hides it
                    print(line[2:], file=sys.stderr)
            return 0
        queued = queued_arrays(jobs, options.max_nodes) if is_sweep else []
        missing = missing_arrays(jobs, queued)
        of_extra = option_of(jobs[0].cluster.extra, "--partition")
        rows = scheduler.list_partitions(of_extra or jobs[0].partition)
        notes = list(dict.fromkeys(filter(None, (check_types(job, rows) for job in missing))))
        notes += find_short_arrays(jobs) if is_sweep else []
        check_with_slurm(missing, rows)
        closed = missing and scheduler.closed_partitions(rows)  # sbatch ignores them
        if options.test_only:
            but = f", but it would wait: {closed}" if closed else ""
            what = "this job" if len(missing) == 1 else f"these {len(missing)} arrays"
            accepted = f"SLURM accepts {what}{but}" if missing else "all cells are queued already"
            print("\n".join([f"{accepted}; nothing was submitted", *notes]))
            return 0
        only_reports()
        if is_sweep:
            lines = submit_sweep(jobs, rows, max_nodes=options.max_nodes)
        else:
            lines = submit(jobs[0], render(jobs[0]), rows)
        notes += [f"the job waits: {closed}"] if closed else []
        print("\n".join([lines, *(f"note    {note}" for note in notes)]))
        return 0
    except jsonargparse.ArgumentError as error:
        return fail(_explain(str(error)), 2)
    except (ValueError, OSError, RuntimeError) as error:
        return fail(str(error), 2)


def _plan_of(jobs: Sequence[Job], options: jsonargparse.Namespace) -> str:
    """Returns the batch scripts, and what they may cost as comments."""
    comments = []
    if options.target == "sweep":
        comments += [table_of(jobs), *how_arrays_wait(jobs, options.max_nodes)]
        comments += find_short_arrays(jobs)
    if options.hardware is not None:
        comments.append(plan_on(options.hardware, jobs[0]))
    scripts = "\n".join(render(job) for job in jobs).removesuffix("\n")
    return "\n".join([scripts, *("\n# " + "\n# ".join(text.splitlines()) for text in comments)])


def _explain(message: str) -> str:
    explained = explain_parse_error(
        message, build_parser(), expected=lambda _: "--help describes what it takes"
    )
    if "is not an option" in explained:
        return f"{explained}; options of the recipe come after --"
    if "required" in explained and "target" in explained:
        return f"no target given; choose one of {', '.join(TARGETS)}"
    return explained


if __name__ == "__main__":
    sys.exit(run_main(main))
