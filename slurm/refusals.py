"""Explains why SLURM refuses a job, and refuses GPUs on which a measurement would mean nothing."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from slurm import scheduler
from slurm.batch_script import MIG_SLICE, Job, check_slices
from slurm.runtime.allocation import flags_of, option_of
from slurm.scheduler import PartitionRow
from unitransformer.record.units import format_count

# What sbatch prints before a reason, and reasons beside which there is a better one.
MARKS = re.compile("(sbatch: )?(error|fatal|allocation failure): (Batch job submission failed: )?")
VAGUE = re.compile(r"Unspecified error|Job violates accounting/QOS policy.*")
CHOOSE_NODES = {"--nodelist", "--nodefile", "--reservation"}  # of sbatch
UNTYPED = "without a type"


class Hint(NamedTuple):
    """What to do if SLURM's reason has certain words."""

    words: str  # regular expression, without regard to case
    option: str | None  # of slurm.submit
    see: str  # what to give, or where to look


TIME_LIMITS = "`sinfo -o '%P %l'` lists the limits of partitions"
NUMBER_OF_JOBS = (
    "the site limits how many jobs a user may have in the queue, and each task of an array is one: "
    "submit again when some have ended"
)
# The first that applies; words of the site's own rules too.
HINTS = (
    Hint("MaxSubmit|MaxJobs|too many jobs", None, NUMBER_OF_JOBS),
    Hint(
        r"\baccounts?\b|association",
        "account",
        "`sacctmgr show associations user=$USER` lists yours",
    ),
    Hint("MaxWall", "time", TIME_LIMITS),
    Hint(
        r"QOS\w*Limit|Assoc\w*Limit|QOS\w*Max|accounting/QOS policy",
        None,
        "this is a limit of your account or quality of service (`sacctmgr show qos`): ask for "
        "fewer nodes, devices or tasks, a shorter --time, or another --qos",
    ),
    Hint("time.?limit", "time", TIME_LIMITS),
    Hint(r"\bqos\b|quality of service", "qos", "`sacctmgr show qos` lists them"),
    Hint("partition", "partition", "`sinfo -s` lists them"),
    Hint("feature|constraint", "constraint", "`sinfo -o '%P %f'` lists the features of nodes"),
    Hint("node name", "exclude", "`sinfo -N` lists them; write several as node3,node[5-7]"),
    Hint("dependency", "dependency", "`squeue --me` lists your jobs"),
)


class Refusal(ValueError):
    """SLURM refuses a job."""


def reasons_of(stderr: str) -> str:
    """Returns the reasons that sbatch printed in one line."""
    lines = [line.strip() for line in stderr.splitlines()]
    marked = [line for line in lines if MARKS.match(line)]
    texts = [MARKS.sub("", line, count=1).strip(" .") for line in marked or lines]
    reasons = dict.fromkeys(text for text in texts if re.search("[A-Za-z]", text))
    return "; ".join([text for text in reasons if not VAGUE.fullmatch(text)] or reasons)


def hint_of(reasons: str, job: Job, rows: Sequence[PartitionRow]) -> str | None:
    """Returns what to change in a refused job, if the reasons allow a guess.

    `rows` are the nodes of the job's partitions.
    """
    for words, option, see in HINTS:
        if re.search(words, reasons, re.IGNORECASE):
            if option is None:
                more = ", or give --max-array-tasks, as a task runs several cells"
                return see + (more if see == NUMBER_OF_JOBS and job.target == "sweep" else "")
            value = getattr(job, option)
            given = f"{option} is {value}; give another" if value else f"no {option} given; give"
            return f"{given} --{option} ({see})"
    if re.search(r"\bgres\b|\btres\b", reasons, re.IGNORECASE):
        return (
            f"gpu_request is {job.gpu_request}; set another in the table of the cluster, or "
            '"none" if SLURM does not count GPUs here (`scontrol show config | grep GresTypes`)'
        )
    if re.search("node configuration|processors|node count", reasons, re.IGNORECASE):
        wanted = f"{job.devices} GPUs{f' of type {job.gpu_type}' * bool(job.gpu_type)}"
        wanted = f"{format_count(job.nodes, 'node')} with {wanted if job.on_gpus else 'its tasks'}"
        has = describe_gpus(rows) if job.on_gpus else ""
        return f"it needs {wanted}{f', and {has}' if has else ''}"
    return None


def describe_gpus(rows: Sequence[PartitionRow]) -> str:
    """Returns, for example, partition gpu has 2 nodes with 4 x a100, 1 node with 8 x h100."""
    texts = []
    for name in dict.fromkeys(row.name for row in rows):
        nodes: Counter[str] = Counter()
        for row in rows:
            if row.name == name and row.gpus:
                gpus = " + ".join(
                    f"{number} x {kind or 'GPU'}" for kind, number in row.gpus.items()
                )
                nodes[gpus] += 1
        kinds = [f"{format_count(number, 'node')} with {gpus}" for gpus, number in nodes.items()]
        texts += [f"partition {name} has {', '.join(sorted(kinds))}"] if kinds else []
    return "; ".join(texts)


def check_types(job: Job, rows: Sequence[PartitionRow]) -> str | None:
    """Returns a note for a job that may get one of several types of GPUs.

    Raises ValueError if ranks, or cells of a sweep, could get different types, or if several
    devices could only be MIG slices. `rows` are the nodes of the job's partitions.
    """
    extra = job.cluster.extra
    is_chosen = job.gpu_type or any(gpu.type for gpu in job.cluster.extra_gpus)
    if not job.on_gpus or is_chosen or flags_of(extra) & CHOOSE_NODES:
        return None
    # sbatch reads the last of several options.
    exclude = option_of(extra, "--exclude") or job.exclude
    excluded = set(scheduler.expand_nodes(exclude)) if exclude else set()
    rows = [row for row in rows if row.node not in excluded]
    rows = [row for row in rows if sum(row.gpus.values()) >= job.devices]
    groups = select_nodes(option_of(extra, "--constraint") or job.constraint, rows)
    types = sorted({kind for row in itertools.chain(*groups) for kind in row.gpus})
    names = ", ".join(dict.fromkeys(row.name for row in rows))
    if types and all(MIG_SLICE.search(kind) for kind in types):
        check_slices(f"partition {names} has only GPUs of type {', '.join(types)}", job)
    if len(types) < 2:
        return None
    which = f"partition {names} has GPUs of the types {', '.join(k or UNTYPED for k in types)}"
    is_mixed = any(
        (job.nodes > 1 and len({kind for row in group for kind in row.gpus}) > 1)
        or (job.devices > 1 and any(len(row.gpus) > 1 for row in group))
        for group in groups
    )
    if is_mixed or job.target == "sweep":
        what = "ranks" if is_mixed else "cells"
        raise ValueError(
            f"{which}, and the {what} of this job could get different ones; choose one with "
            "--gpu-type or --constraint"
        )
    return f"{which}; the job gets any of them: choose one with --gpu-type or --constraint"


def select_nodes(constraint: str | None, rows: Iterable[PartitionRow]) -> list[set[PartitionRow]]:
    """Returns the nodes with the features of a constraint; a job gets nodes of one of the sets.

    SLURM reads & and | from left to right. In brackets, all nodes have the same of the alternatives
    [a|b]; with [a*2&b*4], some nodes have one feature and some have the other.
    """
    text = re.sub(r"\*[0-9]+", "", constraint or "")
    before, bracket, rest = text.partition("[")
    inside, _, after = rest.partition("]")
    same = [f"{before}({item.replace('&', '|')}){after}" for item in inside.split("|")]
    texts = same if bracket else [text]
    return [_match(iter(re.findall(r"[()&|]|[^()&|\s]+", item)), set(rows)) for item in texts]


def _match(words: Iterator[str], rows: set[PartitionRow]) -> set[PartitionRow]:
    """Returns the nodes that an expression of features chooses, up to a closing parenthesis."""
    chosen, operator = rows, "&"
    for word in words:
        if word == ")":
            break
        if word in "&|":
            operator = word
            continue
        if word == "(":
            found = _match(words, rows)
        else:
            found = {row for row in rows if word in row.features.split(",")}
        chosen = chosen & found if operator == "&" else chosen | found
    return chosen
