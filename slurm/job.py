"""What a batch script runs: starts the ranks, watches them, and settles what comes after.

0 done | 1 failed | 2 refused | 75 stopped by a signal, saved and queued again where that can be.
Python itself is the job's process here: a signal to it ends nothing, and what follows is tested.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slurm import queue
from slurm.markers import RUN, Attempt, find_record, read_json, write_attempt
from unitransformer.stop_signals import EXIT_CODE, SIGNALS

FOLDER = "UNITRANSFORMER_JOB_FOLDER"  # of the job, where the script does not name it
RUN_FOLDER = "UNITRANSFORMER_RUN_FOLDER"  # of the run: the same for all ranks and every start
ERRORS = "UNITRANSFORMER_ERRORS"  # folder where ranks say why they failed
POLL_S = 0.5
GRACE_S = 3.0  # from the first rank's failure until the others are killed
PATIENCE_S = 4.0  # from that until srun itself is
PROBE_S = 6.0  # for a node to answer
MAX_RESTARTS = 5  # after failures of nodes
SHAPE = ("SLURM_JOB_NUM_NODES", "SLURM_TASKS_PER_NODE")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What SLURM has given this job, by its environment."""

    job: str
    restart: int
    node_list: str
    nodes: int
    tasks_per_node: tuple[int, ...]
    gpus_per_node: int | None
    array: str | None
    task: str | None  # of the array

    @property
    def tasks(self) -> int:
        return sum(self.tasks_per_node)


@dataclass(frozen=True, kw_only=True)
class Words:
    """The command line of the job."""

    target: str
    arguments: Sequence[str]
    folder: Path
    python: str
    srun: Sequence[str]
    local_disk: Path | None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the ranks ended."""

    exit_code: int
    is_done: bool  # and says so itself
    is_cancelled: bool
    reason: str = ""
    is_refused: bool = False
    dead_nodes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What comes after."""

    attempt: Attempt
    exit_code: int
    requeue: bool = False
    exclude: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    try:
        allocation = read_allocation(os.environ)
        words = read_words(sys.argv[1:] if argv is None else argv, allocation)
        check_shape(allocation, words)
        return run_job(allocation, words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


# ------------------------------------------------------------------------------------ reading


def read_allocation(variables: Mapping[str, str]) -> Allocation:
    """Raises ValueError outside a batch job, and for a task of srun."""
    if "SLURM_JOB_ID" not in variables or any(name not in variables for name in SHAPE):
        raise ValueError(
            "slurm.job is run by a batch job: sbatch slurm/gpt.sbatch, or python -m slurm.submit"
        )
    if "SLURM_STEP_ID" in variables and variables.get("SLURM_STEP_NUM_TASKS"):
        raise ValueError(
            "slurm.job starts srun itself; let the batch script run it without srun, once"
        )
    gpus = variables.get("SLURM_GPUS_ON_NODE")
    return Allocation(
        job=variables["SLURM_JOB_ID"],
        restart=int(variables.get("SLURM_RESTART_COUNT", 0)),
        node_list=variables.get("SLURM_JOB_NODELIST", ""),
        nodes=int(variables["SLURM_JOB_NUM_NODES"]),
        tasks_per_node=_repeated(variables["SLURM_TASKS_PER_NODE"]),
        gpus_per_node=int(gpus) if gpus and gpus.isdigit() else None,
        array=variables.get("SLURM_ARRAY_JOB_ID"),
        task=variables.get("SLURM_ARRAY_TASK_ID"),
    )


def _repeated(text: str) -> tuple[int, ...]:
    """8(x2),4 as 8, 8, 4."""
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.partition("(x")
        counts += [int(number)] * int(times.removesuffix(")") or 1)
    return tuple(counts)


def read_words(argv: Sequence[str], allocation: Allocation) -> Words:
    """The command line; %a in an argument becomes the number of the array's task."""
    words = list(argv)
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m slurm.job", description=__doc__)
    parser.add_argument("target", choices=["recipes.gpt", "recipes.bert", "recipes.vit", "sweep"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--srun", action="append", default=[], help="another option of srun")
    parser.add_argument("--local-disk", type=Path, help="folder on every node's own disk")
    own = parser.parse_args(words[:end])
    arguments = words[end + 1 :]
    number = allocation.array or allocation.job
    folder = own.folder or Path(os.environ.get(FOLDER) or f"runs/slurm-{number}")
    if allocation.task is not None:
        folder /= f"task-{allocation.task}"
        arguments = [word.replace("%a", allocation.task) for word in arguments]
    return Words(
        target=own.target,
        arguments=arguments,
        folder=folder.absolute(),
        python=own.python,
        srun=own.srun,
        local_disk=own.local_disk,
    )


def option_of(arguments: Sequence[str], flag: str) -> str | None:
    """The last value of `flag`."""
    found = None
    for index, word in enumerate(arguments):
        if word.startswith(f"{flag}="):
            found = word.partition("=")[2]
        elif word == flag and index + 1 < len(arguments):
            found = arguments[index + 1]
    return found


def check_shape(allocation: Allocation, words: Words) -> None:
    """Raises ValueError, with the numbers, where tasks, nodes, GPUs and options disagree."""
    tasks = allocation.tasks_per_node
    if words.target == "sweep":
        if allocation.nodes > 1:
            raise ValueError(
                f"a sweep's cells run on one node and the job has {allocation.nodes}; "
                "ask for --nodes=1 and more tasks of the array"
            )
        return
    if len(set(tasks)) > 1:
        raise ValueError(
            f"the nodes have {', '.join(map(str, tasks))} tasks; give each as many with "
            "--ntasks-per-node"
        )
    for flag, has, fix in (
        ("--devices", tasks[0], "--ntasks-per-node"),
        ("--num-nodes", allocation.nodes, "--nodes"),
    ):
        asked = option_of(words.arguments, flag)
        if asked is not None and asked != str(has):
            what = "tasks on a node" if flag == "--devices" else "nodes"
            raise ValueError(
                f"{flag} is {asked} and the job has {has} {what}; leave {flag} out, or submit "
                f"with {fix}={asked}"
            )
    gpus = allocation.gpus_per_node
    on_cpu = option_of(words.arguments, "--accelerator") == "cpu"
    if gpus is not None and not on_cpu and gpus != tasks[0]:
        raise ValueError(
            f"the job has {tasks[0]} tasks and {gpus} GPUs on a node, and a rank is a task with a "
            f"GPU; submit with --ntasks-per-node={gpus} --gpus-per-node={gpus}, or other numbers"
        )


# ------------------------------------------------------------------------------------ running


def run_job(allocation: Allocation, words: Words) -> int:
    """Start the ranks and wait; write down how it ended; returns the exit code."""
    words.folder.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(
        job=allocation.job,
        restart=allocation.restart,
        nodes=allocation.node_list,
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    if _is_done(words):
        _say(f"done already: {words.folder}")
        write_attempt(words.folder, replace(attempt, outcome="done"))
        return 0
    write_attempt(words.folder, attempt)
    ended = _run_ranks(allocation, words)
    verdict = settle(attempt, ended)
    write_attempt(words.folder, verdict.attempt)
    if verdict.attempt.reason:
        _say(f"{verdict.attempt.outcome}: {verdict.attempt.reason}")
    if verdict.requeue:
        _requeue(allocation, words, verdict)
    return verdict.exit_code


def settle(attempt: Attempt, ended: Ended) -> Verdict:
    """What became of the job, and what is to be done about it."""
    if ended.is_done and ended.exit_code == 0:
        return Verdict(attempt=replace(attempt, outcome="done"), exit_code=0)
    if ended.is_cancelled:
        reason = "cancelled" + (f"; {ended.reason}" if ended.reason else "")
        return Verdict(attempt=replace(attempt, outcome="stopped", reason=reason), exit_code=75)
    if ended.exit_code == EXIT_CODE:
        return Verdict(
            attempt=replace(
                attempt, outcome="stopped", reason=ended.reason or "asked to", is_requeued=True
            ),
            exit_code=EXIT_CODE,
            requeue=True,
        )
    if ended.is_refused:
        return Verdict(
            attempt=replace(attempt, outcome="refused", reason=ended.reason), exit_code=2
        )
    reason = ended.reason or (
        "it ended with exit code 0, and no record says that it is done"
        if ended.exit_code == 0
        else f"srun ended with exit code {ended.exit_code}"
    )
    failed = replace(attempt, outcome="failed", reason=reason)
    if ended.dead_nodes and attempt.restart < MAX_RESTARTS:
        return Verdict(
            attempt=replace(failed, is_requeued=True),
            exit_code=1,
            requeue=True,
            exclude=",".join(ended.dead_nodes),
        )
    return Verdict(attempt=failed, exit_code=1)


def _run_ranks(allocation: Allocation, words: Words) -> Ended:
    errors = words.folder / f"errors-{allocation.restart}"
    errors.mkdir(exist_ok=True)
    for old in errors.iterdir():
        old.unlink()
    since_s = time.time() - 1  # file systems round
    caught: list[int] = []
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in SIGNALS}
    try:
        srun = subprocess.Popen(
            command_of(words), env={**os.environ, **_variables(allocation, words, errors)}
        )
        code, probes = _watch(srun, allocation, errors, caught)
        if code == 0 and any(errors.glob("*.stopped")):
            code = EXIT_CODE
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    is_cancelled = code != 0 and queue.is_cancelled(allocation.job)
    told = Ended(
        exit_code=code,
        is_done=_is_done(words),
        is_cancelled=is_cancelled,
    )
    if code in (0, EXIT_CODE):
        return replace(told, reason=_why_stopped(words)) if code else told
    dead = [] if is_cancelled else _read_answers(probes)
    for number, node in _silent_ranks(allocation, errors, dead):
        _write_error(errors / f"{number}.json", "NodeFailure", f"{node} does not answer any more")
    is_refused = any(
        (read_json(path) or {}).get("failure", {}).get("is_bad_usage")
        for path in errors.glob("*.json")
    )
    return replace(
        told,
        is_refused=is_refused or (code == 2 and not any(errors.glob("*.json"))),
        dead_nodes=dead,
        reason=_write_row(allocation, words, errors, since_s),
    )


def command_of(words: Words) -> list[str]:
    """What starts the ranks, or the one process of a sweep."""
    srun = ["srun", "--kill-on-bad-exit=1", *words.srun]
    if words.target == "sweep":
        srun += ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
        own = ["scaling", "sweep", *words.arguments, "--max-cells", "1"]
    else:
        own = [words.target, *words.arguments]
        if not any(word.partition("=")[0] == "--resume" for word in words.arguments):
            own += ["--resume", "auto"]
    return [*srun, words.python, "-m", "slurm.rank", words.python, "-m", *own]


def _variables(allocation: Allocation, words: Words, errors: Path) -> dict[str, str]:
    variables = {ERRORS: str(errors), "PYTHONUNBUFFERED": "1"}
    if words.target != "sweep":
        variables[RUN_FOLDER] = str(words.folder / RUN)
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        variables["SRUN_CPUS_PER_TASK"] = cpus  # srun no longer takes it from sbatch
    if words.local_disk is not None:
        # Of this job alone: what is left of another cannot be taken for its own.
        place = words.local_disk / f"unitransformer-{allocation.job}"
        variables |= {
            "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
            "TRITON_CACHE_DIR": str(place / "triton"),
        }
    return variables


def _watch(
    srun: "subprocess.Popen[bytes]", allocation: Allocation, errors: Path, caught: list[int]
) -> tuple[int, Mapping[str, "subprocess.Popen[bytes]"]]:
    """Wait for srun; hand on what only this process was sent; kill what a failed rank leaves.

    Returns:
        Its exit code, and what asks the nodes whether they are alive, if a rank has failed.
    """
    step = f"{allocation.job}.0"
    num_handed_on, failed_at_s = 0, math.inf
    probes: Mapping[str, subprocess.Popen[bytes]] = {}
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = srun.wait(POLL_S)
            if code and failed_at_s == math.inf:
                probes = _ask_nodes(allocation)
            return (code if code >= 0 else 128 - code), probes
        if len(caught) > num_handed_on:
            num_handed_on = len(caught)
            # Not every signal to a job reaches its ranks; twice is as good as once.
            _quietly("scancel", "--signal=USR1", step)
        if failed_at_s == math.inf and any(errors.glob("*.json")):
            failed_at_s = time.monotonic()
            probes = _ask_nodes(allocation)
        if time.monotonic() > failed_at_s + GRACE_S:
            _quietly("scancel", "--signal=KILL", step)
            try:
                srun.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                srun.kill()  # its node is gone


def _quietly(*command: str) -> None:
    with contextlib.suppress(ValueError, RuntimeError):
        queue.call(*command)


# ------------------------------------------------------------------------------------ settling


def _is_done(words: Words) -> bool:
    """By what the run itself has written, not by an exit code."""
    if words.target == "sweep":
        return True  # a cell's own outcome says what became of it
    named = option_of(words.arguments, "--record")
    record = read_json(Path(named)) if named else find_record(words.folder / RUN)
    return record is not None and record.get("status") == "ok"


def _why_stopped(words: Words) -> str:
    if words.target == "sweep":
        return "the cell under way is given back"
    record = find_record(words.folder / RUN) or {}
    error = record.get("error") or {}
    return str(error.get("message") or "asked to stop before training began")


def _ask_nodes(allocation: Allocation) -> dict[str, "subprocess.Popen[bytes]"]:
    """Whether each node of the job still starts anything; the answers come meanwhile."""
    if allocation.nodes == 1:
        return {}
    return {
        name: subprocess.Popen(
            [
                *("srun", "--overlap", f"--nodelist={name}", "--nodes=1", "--ntasks=1"),
                *("--ntasks-per-node=1", f"--immediate={PROBE_S:.0f}", "true"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in _names(allocation)
    }


def _names(allocation: Allocation) -> list[str]:
    return queue.call("scontrol", "show", "hostnames", allocation.node_list).stdout.split()


def _read_answers(probes: Mapping[str, "subprocess.Popen[bytes]"]) -> list[str]:
    """Nodes that do not answer."""
    deadline = time.monotonic() + PROBE_S
    dead = []
    for name, probe in probes.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            probe.wait(max(0.0, deadline - time.monotonic()))
        if probe.poll() != 0:
            probe.kill()
            dead.append(name)
    return dead if len(dead) < len(probes) else []  # then it is not they that do not answer


def _silent_ranks(
    allocation: Allocation, errors: Path, dead: Sequence[str]
) -> list[tuple[int, str]]:
    """Ranks on dead nodes, with their node. Tasks are dealt out node by node."""
    if not dead:
        return []
    names = _names(allocation)
    each = allocation.tasks_per_node[0]
    return [
        (names.index(name) * each + local, name)
        for name in dead
        for local in range(each)
        if not (errors / f"{names.index(name) * each + local}.json").exists()
    ]


def _write_error(path: Path, kind: str, message: str) -> None:
    failure = {"type": kind, "message": message, "lines": [], "at_s": 0.0}
    path.write_text(json.dumps({"failure": failure}))


def _write_row(allocation: Allocation, words: Words, errors: Path, since_s: float) -> str:
    """The record of what failed first, where the ranks have not written it; in words."""
    if words.target == "sweep" or not any(errors.glob("*.json")):
        return ""
    variables = {
        **{name: value for name, value in os.environ.items() if name != "SLURM_PROCID"},
        RUN_FOLDER: str(words.folder / RUN),
        "RANK": "0",
        "WORLD_SIZE": str(allocation.tasks),
        "LOCAL_WORLD_SIZE": str(allocation.tasks_per_node[0]),
    }
    recipe = words.target.removeprefix("recipes.")
    done = subprocess.run(
        [
            *(words.python, "-m", "recipes.failed", recipe, errors, str(since_s)),
            *("--", *words.arguments),
        ],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    told: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            told = json.loads(line)
    if not told:
        first = min(errors.glob("*.json"))
        failure = (read_json(first) or {}).get("failure", {})
        told = {"rank": first.stem, "message": failure.get("message", "it said nothing")}
    return re.sub(r"\s+", " ", f"rank {told['rank']} of {allocation.tasks}: {told['message']}")


def _requeue(allocation: Allocation, words: Words, verdict: Verdict) -> None:
    """Queue this job or task again; where that cannot be, say how to go on."""
    # Said before: what follows ends this process.
    _say("to be queued again" + (f", without {verdict.exclude}" if verdict.exclude else ""))
    refused = queue.requeue(allocation.job, exclude=verdict.exclude)
    if refused is None:
        return
    write_attempt(words.folder, replace(verdict.attempt, is_requeued=False))
    script = words.folder / "job.sbatch"
    how = (
        f"sbatch {script}"
        if script.exists()
        else f"{FOLDER}={words.folder} sbatch, with the same script and options"
    )
    _say(f"not queued again ({refused}); go on with: {how}")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
