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
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse

from slurm import scheduler
from slurm.batch_script import Job, render, seconds_of
from slurm.clusters import CLUSTERS, NO_CLUSTER, load_cluster
from slurm.job_files import SCRIPT, SUBMITTED, list_attempts
from slurm.preflight import check_recipe, plan_on, to_sweep_array
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

TARGETS = ("recipes.gpt", "recipes.bert", "recipes.vit", "sweep")
DEVICES = 8
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
        job = build_job(options, arguments)
        script = render(job)
        if options.dry_run:
            plan = "" if options.hardware is None else plan_on(options.hardware, job)
            print(script, end="")
            if plan:
                print("\n# " + "\n# ".join(plan.splitlines()))
            return 0
        _run_sbatch(["--test-only"], script)
        closed = scheduler.closed_partitions(job.partition)  # sbatch does not mention them
        if options.test_only:
            but = f", but it would wait: {closed}" if closed else ""
            print(f"SLURM accepts this job{but}; nothing was submitted")
        else:
            only_reports()
            print(submit(job, script) + (f"\nnote    the job waits: {closed}" if closed else ""))
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
    add("--max-parallel", type=int, default=8, help="sweep tasks that run at once")
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


def build_job(options: jsonargparse.Namespace, arguments: Sequence[str]) -> Job:
    """Returns the job, checked as far as is possible without SLURM.

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
    if is_sweep:
        return to_sweep_array(job, options.max_parallel)
    check_recipe(job, recipe)
    return job


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
    """Returns what sbatch prints; raises ValueError if SLURM refuses the job."""
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
        if "array" in error:
            error += f"; here an array may have {scheduler.max_array_tasks()} tasks, from 0 on"
        raise ValueError(f"SLURM refuses this job: {error}")
    return sbatch.stdout


def submit(job: Job, script: str) -> str:
    """Queues the job; returns its id, log and the commands to follow it.

    Raises ValueError if SLURM refuses the job, and leaves no file behind.
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
