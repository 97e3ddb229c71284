"""Runs `python -m scaling peers`: measures pairs, writes records and prints a table."""

import datetime
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from scaling.peers import ranking
from scaling.peers.options import PeersOptions
from scaling.peers.pairing import WARMUP_STEPS, measure_pair
from scaling.peers.record import (
    Comparison,
    describe_comparison,
    is_comparison,
    read_comparison,
    write_comparison,
)
from unitransformer.cli import only_reports
from unitransformer.config import Compile, RunConfig, from_dict, to_dict
from unitransformer.costs.flops import flops_per_sample
from unitransformer.launch.subprocess_module import run_module
from unitransformer.peers.catalog import OURS, Peer
from unitransformer.record.units import format_count, format_duration

ONE_LAUNCH = (
    "The interval of one launch does not cover others: run the command again for one that does."
)
PLAN_LIMIT_S = 300.0
START_S = 15.0  # to import and build two networks
COMPILE_S = 40.0
CORE_FLOPS_PER_S, GPU_FLOPS_PER_S = 4e10, 2e14  # for the estimate of --dry-run alone


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One comparison to measure."""

    config: RunConfig
    peer: Peer
    form: str
    compile: Compile

    @property
    def label(self) -> str:
        parts = [self.peer.title, self.form, "" if self.compile == "off" else "compiled"]
        return ", ".join(filter(None, parts))


def run_peers(options: PeersOptions) -> int:
    """Measures every pair, writes its record and prints the tables; returns the exit code.

    The code is 1 if no peer could be measured.

    Raises:
        ValueError: the recipe refuses the options.
        RuntimeError: a worker does not start.
    """
    configs, machine = resolve(options)
    pairs = [pair for config in configs for pair in list_pairs(config, options)]
    if options.is_dry_run:
        print(render_plan(pairs, options, machine))
        return 0
    only_reports()
    paths = []
    for number, pair in enumerate(pairs, 1):
        path = _measure(pair, options, machine)
        paths.append(path)
        comparison = read_comparison(json.loads(path.read_text()), path.name)
        print(f"{number}/{len(pairs)} {pair.label}: {_outcome(comparison)}", flush=True)
    comparisons = list(load_comparisons(options.out))
    fresh = {path.name for path in paths}
    for workload in ranking.find_workloads(comparisons):
        if any(comparison.name in fresh for comparison in workload.comparisons):
            print(f"\n{render(workload)}")
    print(f"\n{format_count(len(paths), 'record')} written to {options.out}")
    return 0 if any(c.failure is None for c in comparisons if c.name in fresh) else 1


def resolve(options: PeersOptions) -> tuple[list[RunConfig], dict[str, Any]]:
    """Returns the config of each batch size and precision, and this machine."""
    questions: list[dict[str, Any]] = [{"machine": True}]
    for batch_size in options.batch_sizes:
        for precision in options.precisions:
            arguments = [*options.recipe_options, "--size", options.size, "--data", "synthetic"]
            arguments += ["--dropout", "0", "--devices", "1", "--strategy", "single"]
            arguments += ["--accelerator", options.accelerator, "--seed", str(options.seed)]
            arguments += [] if batch_size is None else ["--batch-size", str(batch_size)]
            arguments += [] if precision is None else ["--precision", precision]
            questions.append({"recipe": options.recipe, "arguments": arguments})
    text = "".join(f"{json.dumps(question)}\n" for question in questions)
    printed = run_module("recipes.service.plan", [], limit_s=PLAN_LIMIT_S, stdin_text=text)
    machine, *answers = map(json.loads, printed.splitlines())
    for answer in answers:
        if "config" not in answer:
            raise ValueError(answer.get("misread") or answer["refused"])
    host = {"fingerprint": machine["fingerprint"], **machine["host"]}
    return [from_dict(RunConfig, answer["config"]) for answer in answers], host


def list_pairs(config: RunConfig, options: PeersOptions) -> list[Pair]:
    return [
        Pair(config=config, peer=peer, form=form, compile=mode)
        for peer in options.peers
        for form in peer.forms_for(config.recipe)
        for mode in options.compile
    ]


def _measure(pair: Pair, options: PeersOptions, machine: dict[str, Any]) -> Path:
    started, started_s = datetime.datetime.now(datetime.UTC), time.monotonic()
    config = to_dict(pair.config)
    own = {"config": config, "peer": OURS, "form": "", "compile": pair.config.parallel.compile}
    other = {"config": config, "peer": pair.peer.name, "form": pair.form, "compile": pair.compile}
    measured = measure_pair(
        {"ours": own, "peer": other},
        pair.config.parallel.accelerator,
        options.limits,
        seed=f"{options.seed}, {pair.label}, {pair.config.hash()}, {started}",
    )
    fields = {
        "config": config,
        "peer": pair.peer.name,
        "form": pair.form,
        "compile": pair.compile,
        "machine": machine,
        "command": options.command,
        "started_at": started.isoformat(timespec="seconds"),
        "elapsed_s": time.monotonic() - started_s,
    }
    return write_comparison(describe_comparison(fields, measured), options.out)


def load_comparisons(folder: Path) -> Iterator[Comparison]:
    """Yields the readable records of a folder, by file name."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            if is_comparison(content):
                yield read_comparison(content, path.name)
        except (OSError, ValueError) as error:
            print(f"left out {path}: {error}")


def _outcome(comparison: Comparison) -> str:
    if comparison.ours is None or comparison.other is None:
        return f"failed: {comparison.failure}"
    workload = ranking.find_workloads([comparison])[0]
    assert workload.best is not None
    return f"ours {ranking.format_ratio(workload.best.speed)} as fast"


def render(workload: ranking.Workload) -> str:
    """Returns the answer in one sentence, and a table with a row for each peer."""
    rate = ranking.our_rate(workload)
    heading = f"{workload.title}{f': ours {rate}' if rate else ''}"
    rows = ranking.rows(workload)
    return "\n".join(
        [
            ranking.answer(workload),
            "",
            heading,
            tabulate(rows, headers="keys", disable_numparse=True),
            "Ratios are ours over the peer's: above 1 we are faster, below 1 we need less memory.",
            *([ONE_LAUNCH] if ranking.has_single_launches(workload) else []),
        ]
    )


def render_plan(pairs: Sequence[Pair], options: PeersOptions, machine: dict[str, Any]) -> str:
    """Returns what would run, and about how long."""
    total_s, lines = 0.0, []
    for pair in pairs:
        seconds = estimate_s(pair, options)
        total_s += seconds
        batch, precision = pair.config.batch_size, pair.config.parallel.precision
        lines.append(
            f"{pair.config.recipe} {pair.config.size}, batch {batch:,}, {precision}: "
            f"{pair.label}, about {format_duration(seconds)}"
        )
    rounds = format_count(options.limits.rounds, "pair")
    return "\n".join(
        [
            *lines,
            f"{format_count(len(pairs), 'comparison')} of at most {rounds}, about "
            f"{format_duration(total_s)} on {machine['cpu'] or 'this machine'}; nothing was run",
        ]
    )


def estimate_s(pair: Pair, options: PeersOptions) -> float:
    """Returns the seconds of a comparison, from assumed FLOP/s: right within a factor of three."""
    config = pair.config
    is_gpu = config.parallel.accelerator == "cuda"
    from unitransformer.machine.host import available_cores

    rate = GPU_FLOPS_PER_S if is_gpu else CORE_FLOPS_PER_S * available_cores()
    step_s = config.batch_size * flops_per_sample(config, causal=False) / rate
    block_s = max(step_s, 0.25)
    start_s = START_S + (COMPILE_S if pair.compile != "off" else 0)
    needed_s = start_s + 2 * (WARMUP_STEPS * step_s + options.limits.rounds * block_s)
    limit_s = options.limits.seconds
    return needed_s if limit_s is None else min(needed_s, max(limit_s, start_s + 6 * step_s))
