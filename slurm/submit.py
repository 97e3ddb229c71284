"""Submits a batch job to SLURM. Imports nothing heavy, for use on a login node.

    python -m slurm.submit recipes.gpt --nodes 2 --devices 8 -- --size 1.3b --max-steps 5000
    python -m slurm.submit sweep node-8 --max-parallel 4 -- --retry oom

Exit code: 0 submitted; 2 refused by this command or by SLURM, with nothing queued or written.
"""

import datetime
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonargparse
from filelock import FileLock

from slurm import scheduler
from slurm.batch_script import Job, render, seconds_of
from slurm.clusters import CLUSTERS, NO_CLUSTER, load_cluster
from slurm.job_files import SCRIPT, SUBMITTED, list_attempts, read_json
from slurm.preflight import (
    STUDY,
    check_recipe,
    plan_on,
    prepare_sweep,
    sweep_folder,
    sweep_jobs,
    table_of,
)
from slurm.runtime.allocation import flags_of, option_of
from unitransformer.cli import (
    Parser,
    explain_parse_error,
    fail,
    only_reports,
    run_main,
    suggest,
)
from unitransformer.files import why_not_writable, write_atomically
from unitransformer.launch.variables import without_launcher
from unitransformer.record.units import format_count

TARGETS = ("recipes.gpt", "recipes.bert", "recipes.vit", "sweep")
DEVICES = 8
CHAIN = (
    "each array waits for the one before, so that the sweep holds no more nodes than --max-nodes"
)
ARRAYS = "arrays"  # in the folder of a sweep: JSON, the array for each number of nodes
JOB_VARIABLES = ("SBATCH_", "SLURM_", "SRUN_", "UNITRANSFORMER_JOB", "UNITRANSFORMER_RUN")

TEXT_OPTIONS = {
    "--time": "time limit, e.g. 2:00:00, 1-12:00:00, or UNLIMITED",
    "--partition": "one name, or several with commas",
    "--account": "account to charge",
    "--qos": "quality of service",
    "--constraint": "features of nodes, e.g. h200 or [rack1|rack2]",
    "--gpu-type": "e.g. h200",
    "--exclude": "nodes to avoid, e.g. node3 or node[3-5]",
    "--dependency": "e.g. afterok:1234 or singleton",
    "--array": "e.g. 0-9: runs the recipe once per task, with %a in its options replaced by the "
    "number of the task",
    "--name": "name of the job; default: from TARGET",
    "--cluster": "name of a table in --clusters",
}

# Options whose default a cluster may set.
OF_CLUSTERS = ("time", "partition", "account", "qos", "constraint", "gpu_type")
# Options of a recipe that a job sets itself -> what to do instead.
SET_BY_JOB = {
    "--devices": "give it before --, as it sets the shape of the job",
    "--num-nodes": "give --nodes before --, as it sets the shape of the job",
    "--resume": "leave it out; a job resumes by itself",
    "--rehearse": "it needs no job; run the recipe here",
    "--repeats": "a job runs its recipe once; give --array 0-4 before --",
}


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
            notes = []
            if is_sweep:
                notes += [table_of(jobs)] + [CHAIN] * (options.max_nodes is not None)
            if options.hardware is not None:  # before the script, as it may refuse
                notes.append(plan_on(options.hardware, jobs[0]))
            print("\n".join(render(job) for job in jobs), end="")
            for note in notes:
                print("\n# " + "\n# ".join(note.splitlines()))
            return 0
        queued = queued_arrays(jobs) if is_sweep else {}
        missing = [job for job in jobs if job.nodes not in queued]
        _test(missing)
        closed = missing and scheduler.closed_partitions(jobs[0].partition)  # sbatch ignores them
        if options.test_only:
            but = f", but it would wait: {closed}" if closed else ""
            what = "this job" if len(missing) == 1 else f"these {len(missing)} arrays"
            accepted = f"SLURM accepts {what}{but}" if missing else "all cells are queued already"
            print(f"{accepted}; nothing was submitted")
            return 0
        only_reports()
        if is_sweep:
            lines = submit_sweep(jobs, is_chain=options.max_nodes is not None)
        else:
            lines = submit(jobs[0], render(jobs[0]))
        print(lines + (f"\nnote    the job waits: {closed}" if closed else ""))
        return 0
    except jsonargparse.ArgumentError as error:
        return fail(_explain(str(error)), 2)
    except (ValueError, OSError, RuntimeError) as error:
        return fail(str(error), 2)


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m slurm.submit",
        usage="python -m slurm.submit TARGET [STUDY] [options] -- [options of the recipe or sweep]",
        description="Submits a batch job, after checking its options here and with SLURM. Options "
        "that are not given have the value in --cluster, or SLURM's default.",
    )
    add = parser.add_argument
    add("target", type=str, metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    add("study", nargs="?", type=str, default=None, help="name or YAML file of a sweep")
    add("--nodes", type=int, default=1, help="number of nodes")
    add("--devices", type=int | None, default=None, help=f"GPUs per node; {DEVICES} if not given")
    for flag, text in TEXT_OPTIONS.items():
        add(flag, type=str, default=None, help=text)
    add("--max-parallel", type=int, default=8, help="tasks of a sweep's array that run at once")
    add(
        "--max-nodes",
        type=int | None,
        default=None,
        help="nodes that a sweep holds at once; its arrays then run one after the other",
    )
    add("--folder", type=Path | None, default=None, help="new folder of the job; default: by name")
    add("--clusters", type=Path, default=CLUSTERS, help="TOML file with settings of clusters")
    add("--no-requeue", action="store_true", help="never requeue; print how to continue instead")
    add("--dry-run", action="store_true", help="print the batch script and exit")
    add(
        "--hardware",
        type=str,
        default=None,
        help="with --dry-run, add what the job needs on these nodes as comments, e.g. h200-sxm-8",
    )
    add("--test-only", action="store_true", help="let SLURM check the job and exit")
    return parser


def parse(argv: Sequence[str]) -> tuple[jsonargparse.Namespace, list[str]]:
    """Returns the options before `--`, and the arguments of the recipe or sweep after it."""
    end = argv.index("--") if "--" in argv else len(argv)
    return build_parser().parse_args(list(argv[:end])), list(argv[end + 1 :])


def build_jobs(options: jsonargparse.Namespace, arguments: Sequence[str]) -> list[Job]:
    """Returns the jobs, checked as far as is possible without SLURM: one, or those of a sweep.

    Raises ValueError with the option, its value and the fix; RuntimeError if a recipe fails.
    """
    _check_arguments(options, arguments)
    if options.cluster is not None:
        cluster = load_cluster(options.cluster, options.clusters)
    elif options.clusters == CLUSTERS:
        cluster = NO_CLUSTER
    else:
        raise ValueError(f"clusters is {options.clusters}; choose a table of it with --cluster")
    is_sweep = options.target == "sweep"
    recipe = options.target.removeprefix("recipes.")
    study = [] if options.study is None else [options.study]
    # A study may have any name. The name of a job is also part of paths.
    study_name = re.sub(r"[^\w.+]+", "-", Path(options.study or "").stem, flags=re.ASCII)
    study_name = study_name[:60].strip("-") or "sweep"
    name = options.name or (f"sweep-{study_name}" if is_sweep else recipe)
    folder = (options.folder or _new_folder(name)).absolute()
    job = Job(
        target=options.target,
        arguments=[*study, *arguments],
        name=name,
        folder=str(folder),
        directory=os.getcwd(),
        python=sys.executable if cluster.container or not cluster.python else cluster.python,
        nodes=options.nodes,
        devices=_first_given(options.devices, cluster.devices, DEVICES),
        on_gpus=option_of(arguments, "--accelerator") != "cpu",
        **{name: _first_given(options[name], getattr(cluster, name)) for name in OF_CLUSTERS},
        exclude=options.exclude,
        dependency=options.dependency,
        array=options.array,
        requeue=not options.no_requeue,
        cluster=cluster,
    )
    _check_folder(folder)
    time_s = seconds_of(job.time)
    if time_s is not None and time_s <= cluster.signal_ahead_s:
        raise ValueError(
            f"time is {job.time}, and the signal to save arrives {cluster.signal_ahead_s} s before "
            "its end; give a longer --time, or a cluster with a smaller signal_ahead_s"
        )
    if not is_sweep:
        check_recipe(job, recipe)
        return [job]
    jobs = sweep_jobs(job, max_parallel=options.max_parallel, max_nodes=options.max_nodes)
    for part in jobs:
        _check_folder(Path(part.folder))
    return jobs


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _check_arguments(options: jsonargparse.Namespace, arguments: Sequence[str]) -> None:
    if options.target not in TARGETS:
        raise ValueError(f"target is {options.target}; {suggest(options.target, TARGETS)}")
    flags = flags_of(arguments)
    if options.hardware is not None and not options.dry_run:
        raise ValueError(f"hardware is {options.hardware}; it needs --dry-run")
    if "--hardware" in flags:
        raise ValueError("--hardware after --: give it before --, with --dry-run")
    if options.target == "sweep":
        for flag in ("--watch", "--list", "--dry-run"):
            if flag in flags:
                study = [] if options.study is None else [options.study]
                command = shlex.join(["python", "-m", "scaling", "sweep", *study, flag])
                raise ValueError(f"{flag} after --: it needs no job; run it here: {command}")
        return
    if options.max_nodes is not None:
        raise ValueError(f"max-nodes is {options.max_nodes}, which is for sweeps; leave it out")
    if options.study is not None:
        raise ValueError(
            f"{options.study} is before --; put options of the recipe after it: -- --seed 1"
        )
    for flag, fix in SET_BY_JOB.items():
        if flag in flags:
            raise ValueError(f"{flag} after --: {fix}")


def _check_folder(folder: Path) -> None:
    if list_attempts(folder) or (folder / SUBMITTED).exists():
        raise ValueError(
            f"folder {folder} belongs to another job; continue that job with sbatch "
            f"{shlex.quote(str(folder / SCRIPT))}, or choose another --folder"
        )
    if closed := why_not_writable(folder):
        parent, reason = closed
        raise ValueError(
            f"folder {folder}: {parent} cannot be written ({reason}); choose another --folder"
        )


def _new_folder(name: str) -> Path:
    """Returns a path that is unique even if several jobs are submitted in the same second."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs/slurm") / f"{name}-{now}-{secrets.token_hex(2)}"


def _run_sbatch(options: Sequence[str], script: str) -> str:
    """Returns what sbatch prints.

    Raises ValueError if SLURM refuses the job, RuntimeError if its controller does not answer.
    """
    # Inside a job, sbatch would take that job's variables for options of the new one.
    variables = {
        name: value
        for name, value in without_launcher(os.environ).items()
        if name == "SLURM_CONF" or not name.startswith(JOB_VARIABLES)
    }
    try:
        sbatch = subprocess.run(
            ["sbatch", *options],
            input=script,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            env=variables,
        )
    except FileNotFoundError:
        raise ValueError(
            "sbatch is not installed here; submit on a node that has SLURM, or add --dry-run"
        ) from None
    if sbatch.returncode:
        error = scheduler.error_of(sbatch)
        if scheduler.BUSY.search(sbatch.stderr):
            state = "the job was not submitted: try again when `scontrol ping` says UP"
            if "timed out" in error and "--test-only" not in options:  # the answer may be late
                state = "the job may be queued: look at `squeue --me` before you try again"
            raise RuntimeError(f"SLURM's controller does not answer ({error}); {state}")
        if "array" in error:
            error += f"; here an array may have {scheduler.max_array_tasks()} tasks, from 0 on"
        raise ValueError(f"SLURM refuses this job: {error}")
    return sbatch.stdout


def _test(jobs: Sequence[Job]) -> None:
    """Raises ValueError for jobs that SLURM refuses, with the first reason, or as `_run_sbatch`."""
    refused = []
    for job in jobs:
        try:
            _run_sbatch(["--test-only"], render(job))
        except ValueError as error:
            refused.append((job, str(error)))
    if not refused:
        return
    if len(jobs) == 1:
        raise ValueError(refused[0][1])
    shapes = ", ".join(str(job.nodes) for job, _ in refused)
    cells = sum(job.left or 0 for job, _ in refused)
    nodes = "node" if shapes == "1" else "nodes"
    raise ValueError(
        f"{refused[0][1]}; so {format_count(cells, 'cell')} on {shapes} {nodes} could never run: "
        "choose another partition, or leave them out"
    )


def queued_arrays(jobs: Sequence[Job]) -> dict[int, str]:
    """Returns the arrays of this sweep that are in the queue already, by number of nodes.

    Raises as `scheduler.list_queue`.
    """
    arrays = read_json(Path(sweep_folder(jobs[0])) / ARRAYS)
    if not arrays:
        return {}
    in_queue = {row.array for row in scheduler.list_queue([os.getuid()])}
    return {int(nodes): job for nodes, job in arrays.items() if job in in_queue}


def submit_sweep(jobs: Sequence[Job], *, is_chain: bool) -> str:
    """Queues the arrays of a sweep that are not in the queue; returns what to print.

    The folder of the sweep names its arrays, so that the same command submits only what is missing,
    also if two processes run it at once.

    Args:
        is_chain: each array waits for the one before.

    Raises as `_run_sbatch`; ValueError, with what is queued, if that is not the first array.
    """
    out = Path(sweep_folder(jobs[0]))
    is_new = not out.exists()
    prepare_sweep(jobs[0])
    with FileLock(out / f"{ARRAYS}.lock"):
        return _submit_missing(jobs, out, is_chain=is_chain, is_new=is_new)


def _submit_missing(jobs: Sequence[Job], out: Path, *, is_chain: bool, is_new: bool) -> str:
    """As `submit_sweep`, while no other process submits this sweep, whose folder is `out`."""
    queued = queued_arrays(jobs)
    jobs = [job for job in jobs if job.nodes not in queued]
    lines = [
        f"queued  {job} has the cells on {format_count(nodes, 'node')}"
        for nodes, job in queued.items()
    ]
    if not jobs:
        return "\n".join([*lines, "nothing was submitted: all cells are finished or queued"])
    arrays = {str(nodes): job for nodes, job in queued.items()}
    for job in jobs:
        if is_chain and arrays:
            before = ":".join(arrays.values())
            waits = [job.dependency, f"afterany:{before}"]
            job = replace(job, dependency=",".join(filter(None, waits)))
        try:
            printed = submit(job, render(job))
        except (ValueError, RuntimeError) as error:
            if not arrays and is_new and isinstance(error, ValueError):
                _remove_unused(out)
            if not arrays:
                raise
            names = [*arrays.values()]
            are = f"arrays {' and '.join(names)} are" if len(names) > 1 else f"array {names[0]} is"
            raise ValueError(
                f"{error}; of this sweep, {are} queued, and the cells on "
                f"{format_count(job.nodes, 'node')} and more are not; the same command submits them"
            ) from None
        arrays[str(job.nodes)] = printed.split()[1].rstrip(",")
        write_atomically(out / ARRAYS, json.dumps(arrays).encode())
        lines.append(printed)
    if len(jobs) > 1:
        folder = shlex.quote(str(Path(jobs[0].folder).parent))
        lines += [
            "",
            table_of(jobs),
            *([CHAIN] if is_chain else []),
            "",
            f"all     python -m slurm.status {folder}",
        ]
        lines.append(f"        scancel {' '.join(arrays.values())}")
    return "\n".join(lines)


def _remove_unused(folder: Path) -> None:
    """Removes the folder of a sweep that has only just been created."""
    if all(entry.name.startswith((STUDY, ARRAYS)) for entry in folder.iterdir()):
        shutil.rmtree(folder)


def submit(job: Job, script: str) -> str:
    """Queues the job; returns its id, log and the commands to follow it.

    Raises as `_run_sbatch`; a refused job leaves no file behind.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SCRIPT, script.encode())
    try:
        number = _run_sbatch(["--parsable"], script).strip().split(";")[0]
    except ValueError:
        (folder / SCRIPT).unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    submitted = {"job": number, "submitted_at": now, **asdict(job)}
    write_atomically(folder / SUBMITTED, json.dumps(submitted, indent=1).encode())
    log = f"{job.name}-{number}{'_*' if job.array else ''}.log"
    quoted = shlex.quote(job.folder)
    return "\n".join(
        (
            f"job     {number}" + (f", tasks {job.array}" if job.array else ""),
            f"log     {folder / log}",
            f"follow  tail -F {quoted}/{log}",
            f"status  python -m slurm.status {quoted}",
            f"cancel  scancel {number}",
        )
    )


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
