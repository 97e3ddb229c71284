"""`python -m slurm.submit`: options in, a batch job in the queue out; nothing heavy is imported.

    python -m slurm.submit recipes.gpt --nodes 2 --devices 8 -- --size 1.3b --max-steps 5000
    python -m slurm.submit sweep node-8 --max-parallel 4 -- --retry oom

0 submitted | 2 refused, by us or by SLURM, before anything is queued or written.
"""

import datetime
import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jsonargparse

from slurm import scheduler
from slurm.batch_script import Job, render, seconds_of
from slurm.clusters import ANY, CLUSTERS, load_cluster
from slurm.job_files import SCRIPT, SUBMITTED, list_attempts
from slurm.preflight import Command, as_array, check_recipe
from slurm.runtime.allocation import option_of
from unitransformer.cli import explain_parse_error, fail, suggest
from unitransformer.files import why_not_writable, write_atomically
from unitransformer.launch.variables import without_launcher

TARGETS = ("recipes.gpt", "recipes.bert", "recipes.vit", "sweep")
DEVICES = 8
MAX_PARALLEL = 8
OF_JOBS = ("SBATCH_", "SLURM_", "SRUN_", "UNITRANSFORMER_JOB", "UNITRANSFORMER_RUN")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, checked as far as it can be without SLURM."""

    job: Job
    is_dry: bool
    is_test: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Check, show or submit; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        request = read_request(words)
        script = render(request.job)
        if request.is_dry:
            print(script, end="")
            return 0
        _check_by_slurm(script)
        if request.is_test:
            print("SLURM would take this job")
            return 0
        print(submit(request.job, script))
        return 0
    except jsonargparse.ArgumentError as error:
        return fail(_explain(str(error)), 2)
    except (ValueError, OSError, RuntimeError) as error:
        return fail(str(error), 2)


def build_parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="python -m slurm.submit",
        usage="python -m slurm.submit TARGET [STUDY] [options] -- [options of the recipe or sweep]",
        description="Submit a batch job: checked here, shown by --dry-run, checked by SLURM, then "
        "queued. What is not said is the cluster's own default, or that of --cluster.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("target", type=str, metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    add("study", nargs="?", type=str | None, default=None, help="of a sweep: its name or YAML file")
    add("--nodes", type=int, default=1, help="machines")
    add("--devices", type=int | None, default=None, help=f"GPUs and ranks a node; else {DEVICES}")
    add("--time", type=str | None, default=None, help="limit, as 2:00:00 or 1-12:00:00")
    for name in ("partition", "account", "qos"):
        add(f"--{name}", type=str | None, default=None, help="of the cluster")
    add("--gpu-type", type=str | None, default=None, help="as h200")
    add("--exclude", type=str | None, default=None, help="nodes, as node3 or node[3-5]")
    add("--dependency", type=str | None, default=None, help="as afterok:1234 or singleton")
    add(
        "--array",
        type=str | None,
        default=None,
        help="as 0-9%%2: the same once a task; %%a in an option becomes its number",
    )
    add("--max-parallel", type=int, default=MAX_PARALLEL, help="tasks of a sweep at once")
    add("--name", type=str | None, default=None, help="of the job; by default its target's")
    add("--folder", type=Path | None, default=None, help="of log, markers and results")
    add("--cluster", type=str | None, default=None, help="a table of --clusters")
    add("--clusters", type=Path, default=CLUSTERS, help="TOML file of clusters")
    add("--no-requeue", action="store_true", help="never queued again: it saves and says how")
    add("--dry-run", action="store_true", help="print the script and stop")
    add("--test-only", action="store_true", help="let SLURM check the script and stop")
    return parser


def read_request(words: Sequence[str]) -> Request:
    """Raises ValueError naming option, value and fix; ArgumentError for one that is misspelt."""
    end = words.index("--") if "--" in words else len(words)
    given = build_parser().parse_args(list(words[:end]))
    arguments = list(words[end + 1 :])
    if given.target not in TARGETS:
        raise ValueError(f"target is {given.target}; {suggest(given.target, TARGETS)}")
    is_sweep = given.target == "sweep"
    if given.study is not None and not is_sweep:
        raise ValueError(
            f"{given.study} comes before --; options of the recipe come after it, as -- --seed 1"
        )
    for flag in ("--devices", "--num-nodes", "--resume") if not is_sweep else ():
        if any(word.partition("=")[0] == flag for word in arguments):
            fix = {"--num-nodes": "give --nodes before --", "--resume": "leave it out: a job does"}
            raise ValueError(
                f"{flag} after --: {fix.get(flag, 'give it before --')}; the job's shape decides"
            )
    for flag in ("--watch", "--list", "--dry-run") if is_sweep else ():
        if any(word.partition("=")[0] == flag for word in arguments):
            typed = shlex.join(["python", "-m", "scaling", "sweep", *_studied(given.study), flag])
            raise ValueError(f"{flag} after --: it runs nothing, so type it here: {typed}")
    if any(word.partition("=")[0] == "--repeats" for word in arguments) and not is_sweep:
        raise ValueError("--repeats after --: a job is one launch; give --array 0-4 before --")
    if given.cluster is None and given.clusters != CLUSTERS:
        raise ValueError(f"clusters is {given.clusters} and no --cluster says which; name one")
    cluster = ANY if given.cluster is None else load_cluster(given.cluster, given.clusters)
    own = {name: getattr(cluster, name) for name in ("time", "partition", "account", "qos")}
    own |= {
        "gpu_type": cluster.gpu_type,
        "devices": DEVICES if cluster.devices is None else cluster.devices,
    }
    asked = {name: getattr(given, name) for name in (*own, "exclude", "dependency", "array")}
    own |= {name: value for name, value in asked.items() if value is not None}
    study = Path(given.study).stem if given.study else "sweep"
    name = given.name or (f"sweep-{study}" if is_sweep else given.target.removeprefix("recipes."))
    job = Job(
        target=given.target,
        arguments=[*_studied(given.study), *arguments],
        name=name,
        folder=str((given.folder or _free_folder(name)).absolute()),
        directory=os.getcwd(),
        python=sys.executable if cluster.container or not cluster.python else cluster.python,
        nodes=given.nodes,
        tasks=1 if is_sweep else None,
        on_gpus=option_of(arguments, "--accelerator") != "cpu",
        requeue=not given.no_requeue,
        cluster=cluster,
        **own,
    )
    if list_attempts(Path(job.folder)) or (Path(job.folder) / SUBMITTED).exists():
        raise ValueError(
            f"folder {job.folder} is that of another job; go on with it by sbatch "
            f"{shlex.quote(str(Path(job.folder) / SCRIPT))}, or choose another"
        )
    if job.time is not None and seconds_of(job.time) <= cluster.signal_ahead_s:
        raise ValueError(
            f"time is {job.time} and the signal to save comes {cluster.signal_ahead_s} s ahead of "
            "its end: nothing could run; give more time, or signal_ahead_s of a cluster"
        )
    if closed := why_not_writable(Path(job.folder)):
        there, why = closed
        raise ValueError(f"folder {job.folder}: {there} cannot be written ({why}); choose another")
    if is_sweep:
        job = as_array(job, given.max_parallel)
    else:
        check_recipe(
            Command(recipe=given.target.removeprefix("recipes."), arguments=arguments), job
        )
    return Request(job=job, is_dry=given.dry_run, is_test=given.test_only)


def _studied(study: str | None) -> list[str]:
    return [] if study is None else [study]


def _free_folder(name: str) -> Path:
    """Of this job alone, however many are submitted at once."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs/slurm") / f"{name}-{now}-{secrets.token_hex(2)}"


def _check_by_slurm(script: str) -> None:
    """Raises ValueError for what no node or partition of this cluster can ever give."""
    done = _sbatch(["--test-only"], script)
    if done.returncode:
        raise ValueError(f"SLURM refuses this job: {scheduler.said(done)}")


def _sbatch(options: Sequence[str], script: str) -> "subprocess.CompletedProcess[str]":
    # Of a job that this may run in: it would be taken for that of the new one.
    clean = {
        name: value
        for name, value in without_launcher(os.environ).items()
        if name == "SLURM_CONF" or not name.startswith(OF_JOBS)
    }
    try:
        return subprocess.run(
            ["sbatch", *options], input=script, capture_output=True, text=True, env=clean
        )
    except FileNotFoundError:
        raise ValueError(
            "sbatch is not installed here; submit on a node that has SLURM, or add --dry-run"
        ) from None


def submit(job: Job, script: str) -> str:
    """Queue the job; what a person wants to know of it.

    Raises:
        ValueError: SLURM does not take it; nothing is left behind.
        OSError: its folder cannot be written.
    """
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SCRIPT, script.encode())
    done = _sbatch(["--parsable"], script)
    if done.returncode:
        (folder / SCRIPT).unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
        raise ValueError(f"SLURM refuses this job: {scheduler.said(done)}")
    number = done.stdout.strip().split(";")[0]
    told = {
        "job": number,
        "name": job.name,
        "target": job.target,
        "arguments": list(job.arguments),
        "nodes": job.nodes,
        "devices": job.devices,
        "array": job.array,
        "cells": job.cells,
        "directory": job.directory,
        "submitted_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_atomically(folder / SUBMITTED, json.dumps(told, indent=1).encode())
    log = folder / f"{job.name}-{number}{'_*' if job.array else ''}.log"
    return "\n".join(
        (
            f"job     {number}" + (f", tasks {job.array}" if job.array else ""),
            f"log     {log}",
            f"follow  tail -F {shlex.quote(str(folder))}/{log.name}",
            f"status  python -m slurm.status {shlex.quote(job.folder)}",
            f"cancel  scancel {number}",
        )
    )


def _explain(message: str) -> str:
    told = explain_parse_error(
        message,
        build_parser(),
        see_help="--help lists them",
        expected=lambda _: "--help says what it takes",
    )
    if "is not an option" in told:
        return f"{told}; options of the recipe come after --"
    if "required" in told and "target" in told:
        return f"no target given; choose one of {', '.join(TARGETS)}"
    return told


if __name__ == "__main__":
    sys.exit(main())
