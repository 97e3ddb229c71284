"""Turns the options of `slurm.submit` into jobs, checked as far as is possible without SLURM."""

import datetime
import os
import re
import secrets
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse

from slurm.batch_script import PASSED_ON, Job, seconds_of
from slurm.clusters import CLUSTERS, NO_CLUSTER, Cluster, load_cluster
from slurm.job_files import check_free
from slurm.preflight import check_recipe
from slurm.runtime.allocation import check_written_paths, flags_of, option_of
from slurm.sweep_jobs import sweep_jobs
from unitransformer.cli import Parser, suggest
from unitransformer.cli_help import HelpFormatter

TARGETS = ("recipes.gpt", "recipes.bert", "recipes.vit", "sweep")
DEVICES, MAX_PARALLEL = 8, 8
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
# Options that only sweeps have -> what to do instead for a recipe.
OF_SWEEPS = {
    "max_parallel": "--array 0-9%4 limits the tasks of an array",
    "max_nodes": "a job has --nodes",
    "max_array_tasks": "--array says how many tasks there are",
}
# Options that sbatch has under another name.
NAMES_OF_SBATCH = {"name": "--job-name"}
# Options of a recipe that a job sets itself -> what to do instead.
SET_BY_JOB = {
    "--devices": "give it before --, as it sets the shape of the job",
    "--num-nodes": "give --nodes before --, as it sets the shape of the job",
    "--resume": "leave it out; a job resumes by itself",
    "--rehearse": "it needs no job; run the recipe here",
    "--repeats": "a job runs its recipe once; give --array 0-4 before --",
}
# The same for a sweep.
SET_BY_SWEEP = {
    "--left": "cells that are finished are not submitted",
    "--prepare": "the folder of the sweep is created when it is submitted",
    "--only-nodes": "each array runs the cells on its number of nodes",
    "--run-cell": "it is for torchrun; the tasks of a sweep run all unfinished cells",
}


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m slurm.submit",
        usage="python -m slurm.submit TARGET [STUDY] [options] -- [options of the recipe or sweep]",
        description="Submits a batch job, after checking its options here and with SLURM. Options "
        "that are not given have the value in --cluster, or SLURM's default.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("target", type=str, metavar="TARGET", help=f"one of {', '.join(TARGETS)}")
    add("study", nargs="?", type=str, default=None, help="name or YAML file of a sweep")
    add("--nodes", type=int, default=1, help="number of nodes")
    add("--devices", type=int | None, default=None, help=f"GPUs per node; {DEVICES} if not given")
    for flag, text in TEXT_OPTIONS.items():
        add(flag, type=str, default=None, help=text)
    add(
        "--max-parallel",
        type=int | None,
        default=None,
        help=f"tasks of a sweep's array that run at once; {MAX_PARALLEL} if not given",
    )
    add(
        "--max-nodes",
        type=int | None,
        default=None,
        help="nodes that a sweep holds at once; its arrays then run one after the other",
    )
    add(
        "--max-array-tasks",
        type=int | None,
        default=None,
        help="tasks of a sweep's array, each for several cells; 0 for one job without an array",
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
    options = build_parser().parse_args(list(argv[:end]))
    _check_given_once(argv[:end])
    return options, list(argv[end + 1 :])


def _check_given_once(argv: Sequence[str]) -> None:
    flags = [argument.partition("=")[0] for argument in argv if argument.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise ValueError(f"{flag} is given {flags.count(flag)} times; give it once")


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
    if options.max_array_tasks is not None:
        cluster = replace(cluster, max_array_tasks=options.max_array_tasks)
    _check_extra(options, cluster)
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
        on_gpus=False,  # until the recipe or the cells say so
        **{name: _first_given(options[name], getattr(cluster, name)) for name in OF_CLUSTERS},
        exclude=options.exclude,
        dependency=options.dependency,
        array=options.array,
        requeue=not options.no_requeue,
        cluster=cluster,
    )
    if not is_sweep:
        check_free(folder)
    time_s = seconds_of(job.time)
    if time_s is not None and time_s <= cluster.signal_ahead_s:
        raise ValueError(
            f"time is {job.time}, and the signal to save arrives {cluster.signal_ahead_s} s before "
            "its end; give a longer --time, or a cluster with a smaller signal_ahead_s"
        )
    if not is_sweep:
        jobs = [replace(job, on_gpus=check_recipe(job, recipe))]
    else:
        at_once = _first_given(options.max_parallel, MAX_PARALLEL)
        jobs = sweep_jobs(job, max_parallel=at_once, max_nodes=options.max_nodes)
        for part in jobs:
            check_free(Path(part.folder))
    if options.gpu_type is not None and not all(part.on_gpus for part in jobs):
        raise ValueError(
            f"gpu-type is {options.gpu_type}, but this job trains on CPUs; leave gpu-type out"
        )
    return jobs


def _check_extra(options: jsonargparse.Namespace, cluster: Cluster) -> None:
    """Raises ValueError if the cluster's table replaces an option that was given here."""
    flags = flags_of(cluster.extra)
    for name in (*PASSED_ON, "time", "name"):
        flag = NAMES_OF_SBATCH.get(name, f"--{name}")
        if options[name] is not None and flag in flags:
            raise ValueError(
                f"{name} is {options[name]}, but extra of the cluster has "
                f"{flag}={option_of(cluster.extra, flag)}, which takes precedence; leave one out"
            )
    if options.no_requeue and "--requeue" in flags:
        raise ValueError("no-requeue: extra of the cluster has --requeue; leave one out")
    if options.max_parallel is not None and cluster.max_array_tasks == 0:
        raise ValueError(
            f"max-parallel is {options.max_parallel}, but with max-array-tasks 0 a sweep is one "
            "job without an array; leave one out"
        )


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _check_arguments(options: jsonargparse.Namespace, arguments: Sequence[str]) -> None:
    if options.target not in TARGETS:
        raise ValueError(f"target is {options.target}; {suggest(options.target, TARGETS)}")
    flags = flags_of(arguments)
    if options.test_only and options.dry_run:
        raise ValueError("test-only asks SLURM and dry-run only prints; leave one out")
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
        _refuse_flags(flags, SET_BY_SWEEP)
        if "--price-per-hour" in flags and options.hardware is None:
            raise ValueError(
                "--price-per-hour after --: only a plan has costs; add --dry-run --hardware NAME"
            )
        return
    for name, instead in OF_SWEEPS.items():
        if options[name] is not None:
            flag = name.replace("_", "-")
            raise ValueError(
                f"{flag} is {options[name]}, which is for sweeps; leave it out: {instead}"
            )
    if options.study is not None:
        raise ValueError(
            f"{options.study} is before --; put options of the recipe after it: -- --seed 1"
        )
    _refuse_flags(flags, SET_BY_JOB)
    is_array = options.array is not None and not options.array.isdecimal()
    check_written_paths(arguments, is_array=is_array)


def _refuse_flags(flags: Collection[str], fixes: Mapping[str, str]) -> None:
    for flag, fix in fixes.items():
        if flag in flags:
            raise ValueError(f"{flag} after --: {fix}")


def _new_folder(name: str) -> Path:
    """Returns a path that is unique even if several jobs are submitted in the same second."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs/slurm") / f"{name}-{now}-{secrets.token_hex(2)}"
