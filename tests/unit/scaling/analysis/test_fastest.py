"""Tests the ranking of the fastest configurations, and the scaling tables of the report."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from scaling.analysis.efficiency import Estimate, find_curves, find_scatters, pool
from scaling.analysis.fastest import StrategyComparison, compare_strategies
from scaling.analysis.proof import find_proof
from scaling.parity.certificate import Certificate
from scaling.parity.certificate_file import read_certificate
from scaling.report import run_formatting
from scaling.report.sections.fastest import fastest_blocks
from scaling.report.sections.scaling import scaling_blocks
from scaling.report.table_notes import SAME
from scaling.store.outcome import CellOutcome
from scaling.store.reader import Cell
from scaling.store.run import Run
from tests.builders.certificates import (
    CERTIFICATES,
    RESULTS,
    ZERO1,
    make_certificate,
)
from tests.builders.records import CEILING, HOST, make_run
from tests.builders.runs import CLEAN, NOISE, make_spread, repeated, strong, traced, way, weak
from unitransformer.config import RunConfig, to_dict
from unitransformer.record.schema import Status


def only(runs: Sequence[Run]) -> StrategyComparison:
    (comparison,) = compare_strategies(runs, CERTIFICATES)
    return comparison


def names(comparison: StrategyComparison) -> tuple[list[str], list[str]]:
    ranked, unranked = comparison.ranked, comparison.unranked
    return (
        [way.point.config.parallel.strategy for way in ranked],
        [way.point.config.parallel.strategy for way in unranked],
    )


def test_the_fastest_proven_strategy_comes_first_with_ratios_to_the_others() -> None:
    comparison = only([way("zero1", 0.1), way("ddp", 0.05)])
    assert names(comparison) == (["ddp", "zero1"], [])
    first, second = comparison.ranked
    assert (first.against_fastest is not None, first.is_tie) == (True, None)
    assert second.against_fastest is not None
    assert second.against_fastest.value == pytest.approx(0.5, rel=NOISE)
    assert second.is_tie is False


def test_a_ratio_whose_interval_contains_1_is_a_tie() -> None:
    # A lead of 1 % is within the interval of 60 steps that vary by 10 %.
    assert [way.is_tie for way in only([way("ddp", 0.05), way("zero1", 0.0503)]).ranked] == [
        None,
        True,
    ]


def test_a_tie_is_undecided_without_an_interval() -> None:
    comparison = only([way("ddp", 0.05), way("zero1", 0.1, steps=10)])
    assert [way.is_tie for way in comparison.ranked] == [None, None]


def test_a_fast_strategy_without_proof_is_listed_but_not_ranked() -> None:
    comparison = only([way("ddp", 0.05), way("fsdp", 0.02), way("fsdp1", 0.01)])
    assert names(comparison) == (["ddp"], ["fsdp1", "fsdp"])
    untried, different = comparison.unranked
    assert untried.why_unranked == "no certificate of loss parity covers it"
    assert different.why_unranked == "its certificate of loss parity: different"
    assert untried.against_fastest is not None
    assert untried.against_fastest.value > 4


def test_no_strategy_is_fastest_without_proof() -> None:
    (comparison,) = compare_strategies([way("ddp", 0.05), way("fsdp", 0.02)], [])
    assert names(comparison) == ([], ["fsdp", "ddp"])
    assert [way.against_fastest for way in comparison.candidates] == [None, None]


def test_the_parity_reference_needs_no_other_proof() -> None:
    single = make_spread(0.1, strategy="single")
    proof = find_proof(single, [])
    assert proof is not None
    assert (proof.verdict, proof.certificate, proof.holds) == ("reference", None, True)


def test_a_certificate_does_not_cover_a_run_that_offloads_to_the_host() -> None:
    proof = find_proof(way("zero1", 0.05), CERTIFICATES)
    assert proof is not None
    assert proof.holds
    assert find_proof(way("zero1", 0.05, cpu_offload=True), CERTIFICATES) is None


def test_compile_modes_and_batch_splits_are_candidates_of_one_comparison() -> None:
    runs = [
        way("ddp", 0.05),
        way("zero1", 0.06),
        way("ddp", 0.04, batch_size=2, accumulate=2),
        way("fsdp", 0.07, compile="default"),
    ]
    ways = [way.name for way in only(runs).candidates]
    assert ways == ["ddp + 2 micro-batches", "ddp", "zero1", "fsdp + compile default"]


def on_machine(strategy: str, step_s: float, ceilings: Sequence[float], launch: int = 1) -> Run:
    """Ceilings of two ranks; 1 is the ceiling of the other runs."""
    work = [CEILING | {"matmul_flops_per_s": 1e11 * ceiling} for ceiling in ceilings]
    return way(strategy, step_s, f"runs/{strategy}-{launch}.json", changes={"ceiling": work})


def test_a_lead_of_one_launch_counts_only_beyond_the_drift_of_the_machine() -> None:
    # Some 20 % ahead; the interval leaves 15 % at least.
    for slower, actual in (
        ((0.9, 0.9), ["fastest", "slower"]),
        (
            (0.98, 0.8),
            ["best guess", "not confirmed: one launch, and the machine drifted by 25.0%"],
        ),
    ):
        runs = [on_machine("ddp", 0.05, (1, 1)), on_machine("zero1", 0.06, slower)]
        best, other = fastest(runs)
        assert [best["standing"], other["standing"]] == actual
        assert other["ratio"] == "0.840 (0.823 to 0.858)"
    assert best["configuration"] == "ddp", "a guess is not marked as the fastest"


def test_several_launches_on_both_sides_decide_despite_machine_drift() -> None:
    runs = [
        *(on_machine("ddp", 0.05, (1, 1), launch) for launch in (1, 2)),
        *(on_machine("zero1", 0.1, (0.4, 1), launch) for launch in (1, 2)),
    ]
    assert [row["standing"] for row in fastest(runs)] == ["fastest", "slower"]
    best, other = fastest(runs[1:])
    assert best["standing"] == "best guess"
    assert other["standing"].startswith("not confirmed: one launch, and")


def test_one_launch_without_a_ceiling_decides_nothing() -> None:
    unmeasured = way("zero1", 0.1, changes={"ceiling": [None, CEILING]})
    _, other = fastest([way("ddp", 0.05), unmeasured])
    assert other["standing"].endswith("and the drift of the machine is not known")


def test_different_work_is_another_comparison_and_one_strategy_is_no_comparison() -> None:
    ddp = way("ddp", 0.05)
    for other in (
        way("zero1", 0.05, batch_size=8),
        way("zero1", 0.05, precision="bf16-mixed"),
        way("zero1", 0.05, num_nodes=2, batch_size=2),
        way("zero1", 0.05, seed=1),
        way("ddp", 0.05, compile="default"),
    ):
        assert compare_strategies([ddp, other], CERTIFICATES) == []


# ---------------------------------------------------------------------------------- the report


def read(block: str) -> list[dict[str, str]]:
    """The rows of a table as dicts by column heading."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
    heads, _, *body = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in body]


def tables(runs: Sequence[Run]) -> list[list[dict[str, str]]]:
    """Of the curves, each row with what is the same in all rows of its table."""
    return read_all(scaling_blocks(find_curves(runs)))


def read_all(blocks: Sequence[str]) -> list[list[dict[str, str]]]:
    found = []
    for before, block in zip(["", *blocks], blocks, strict=False):
        if block.startswith("|"):
            alike = before.removeprefix(SAME).removesuffix(".") if before.startswith(SAME) else ""
            shared = dict(map(head_and_value, alike.split("; "))) if alike else {}
            found.append([shared | row for row in read(block)])
    return found


def head_and_value(item: str) -> tuple[str, str]:
    """Of a column that is the same in all rows."""
    heads = ("global batch", "batch per device", "speed-up", "slowest rank", "machine drift")
    head = next((head for head in heads if item.startswith(head)), item.split(" ")[0])
    return head, item.removeprefix(head).strip()


def text(runs: Sequence[Run]) -> str:
    """Of the curves."""
    return "\n".join(scaling_blocks(find_curves(runs)))


def test_the_report_has_no_comparison_section_without_candidates() -> None:
    assert text([]) == ""
    again = [strong(0.1, 1), strong(0.1, 1, "runs/b.json")]
    assert text(again) == ""
    assert fastest_blocks(compare_strategies(again, CERTIFICATES)) == []


def test_a_scaling_row_shows_efficiency_and_where_time_was_lost() -> None:
    hot = strong(0.03125, 4, slowest=(3, 3, 3, 0), changes={"flags": ["it was hot"]})
    runs = [strong(0.1, 1, changes={"flags": ["cold"]}), strong(0.05, 2), hot]
    ((two, four), laws) = tables(runs)
    assert (two["devices"], two["efficiency"]) == ("2", "100.0% (100.0% to 100.0%)")
    # At 80 %, 20 % are lost, shared by parts of 10, 30 and 60 % of the step.
    assert four == {
        "FLOPs": "32.4 kFLOP per token",
        "row": "2",
        "strategy": "ddp",
        "global batch": "8",
        "devices": "4",
        "baseline": "1 device: 640 tokens/s (640 to 640)",
        "speed": "2,048 tokens/s (2,048 to 2,048)",
        "speed-up": "3.20 (3.20 to 3.20)",
        "efficiency": "80.0% (80.0% to 80.0%)",
        "lost share": "20.0%",
        "input": "2.0%",
        "optimizer": "6.0%",
        "forward and backward": "12.0%",
        "slowest rank": "rank 3 in 75%",
        "launches": "1",
        "machine drift": "0.0%",
        "record": "[record](runs/4.json)",
    }
    assert "- Flags of the baseline: cold (all rows).\n- Flags: it was hot (row 2)." in text(runs)
    assert [law["law"] for law in laws] == ["Amdahl's law", "Universal scalability law"]
    assert {law["curve"] for law in laws} == {"strong, strategy ddp, global batch 8 (rows 1, 2)"}
    assert laws[0]["parameters"].startswith("serial share s = ")
    assert "three device counts hardly determine b" in laws[1]["remark"]


def pair(step_s: float, **changes: Any) -> list[Run]:
    """A run with steps of 0.1 s on one device, and one on two."""
    name = "-".join(map(str, changes.values()))
    return [
        strong(0.1, 1, f"runs/{name}-1.json", **changes),
        strong(step_s, 2, f"runs/{name}-2.json", **changes),
    ]


def test_curves_share_a_table_with_one_column_per_differing_setting() -> None:
    runs = [*pair(0.05), *pair(0.0625, precision="bf16-mixed"), *pair(0.1, seed=1)]
    (scaling,) = tables(runs)
    actual = [(row["precision"], row["seed"], row["speed-up"][:4]) for row in scaling]
    assert actual == [
        *(("32-true", "0", "2.00"), ("32-true", "1", "1.00"), ("bf16-mixed", "0", "1.60")),
    ]
    assert not {"size", "accelerator", "compile"} & scaling[0].keys()
    about = "All rows: size 6.1 K parameters (2 layers of width 16), accelerator cpu."
    assert f"**Strong scaling.** {about}\n" in text(runs)


def of_size(run: Run, size: str, width: int) -> Run:
    config = replace(run.config, size=size, model=replace(run.config.model, width=width))
    return make_run(run.record | {"size": size, "config": to_dict(config)}, f"runs/{size}.json")


def test_settings_that_follow_from_the_size_have_no_column() -> None:
    large = [of_size(run, "large", 32) for run in pair(0.05, precision="bf16-mixed")]
    wide = [of_size(run, "tiny", 64) for run in pair(0.05)]
    (scaling,) = tables([*pair(0.05), *large])
    assert [(row["size"], row["precision"]) for row in scaling] == [
        ("6.1 K parameters (2 layers of width 16)", "32-true"),
        ("16.2 K parameters (2 layers of width 32)", "bf16-mixed"),
    ]
    assert "model.width" not in scaling[0]
    (scaling,) = tables([*pair(0.05), *large, *wide])
    assert [row["size"].split(" par")[0] for row in scaling] == [
        *("6.1 K", "16.2 K", "48.6 K"),
    ]


def test_strong_and_weak_scaling_have_a_table_each_and_one_numbering() -> None:
    # The run on four devices is on both curves: its global batch of 8 is 2 per device.
    strong_rows, weak_rows, _ = tables(
        [strong(0.1, 1), strong(0.05, 2), weak(0.1, 1), weak(0.1, 4)]
    )
    actual = [(row["row"], row["global batch"], row["devices"]) for row in strong_rows]
    assert actual == [("1", "8", "2"), ("2", "8", "4")]
    assert [(row["row"], row["batch per device"]) for row in weak_rows] == [("3", "2")]


def test_shared_remarks_are_printed_once_with_their_row_numbers() -> None:
    runs = [*pair(0.05), *pair(0.05, seed=1), *pair(0.05, seed=2, steps=10)]
    notes = [line for line in text(runs).splitlines() if line.startswith("- ")]
    assert notes == [
        "- Forward and backward includes smaller kernels, host time and communication; "
        "`--trace` on both runs separates communication (all rows).",
        "- No interval: 10 samples, an interval needs 50 (row 3).",
        "- No law of scaling is fitted: 2 device counts, a fit needs 3 (all rows).",
        "- Waiting for the slowest rank was not measured: the record holds only the times of that "
        "rank (all rows).",
    ]


def test_amdahl_is_marked_as_not_applicable_to_weak_scaling() -> None:
    actual = text([weak(0.1, 1), weak(0.1, 2), weak(0.1, 4)])
    assert "- Amdahl's law is not fitted: it is a law of a fixed global batch (all rows)." in actual
    assert actual.count("not fitted") == 1


def test_a_trace_adds_columns_that_stay_blank_for_other_runs() -> None:
    one, two = strong(0.1, 1), strong(0.05, 2, changes=traced(0.25, 0.1))
    (row,) = tables([one, two])[0]
    assert row["exposed communication"] == "25.0%"
    assert row["trace"] == "traced steps take 1.60 x as long, idle 10.0% (baseline not traced)"
    (_, other), *_ = tables([one, two, strong(0.05, 4)])
    assert (other["exposed communication"], other["trace"]) == ("not measured", "")
    assert "the other parts include idle time (row 1).\n" in text([one, two, strong(0.05, 4)])


def test_the_record_that_explains_the_lost_time_is_bold() -> None:
    again = [strong(s, 2, f"runs/2-{s}.json") for s in (0.05, 0.051, 0.052)]
    (row,) = tables([strong(0.1, 1), *again])[0]
    assert row["launches"] == "3"
    assert row["record"] == "[record](runs/2-0.051.json)"
    assert "- The parts of the lost share are those of the middle launch" in text(
        [strong(0.1, 1), *again]
    )


def on_threads(threads: dict[int, int], **changes: Any) -> list[Run]:
    """A run for each device count, with the given threads per rank."""
    return [
        strong(0.1, n, changes={"hardware": [HOST | {"threads": each} | changes] * n})
        for n, each in threads.items()
    ]


def test_differing_conditions_are_printed_once_with_their_rows() -> None:
    other = {"versions": {"python": "3.11.7", "torch": "2.14.0"}}
    runs = [*pair(0.05), *pair(0.05, seed=1, changes=other)]
    assert "versions of torch" not in text(runs)
    mixed = [*pair(0.05), runs[2], strong(0.05, 2, seed=1)]
    assert "\n> - row 2: versions of torch differ: 2.14.0 (record 1); 2.13.0 (record 2)" in text(
        mixed
    )
    assert "commit" not in text(mixed)
    dirty = {"code": {"commit": "0123", "is_dirty": True}}
    actual = "> - row 1: code may not be its commit: uncommitted changes (all records)"
    assert actual in text(pair(0.05, changes=dirty))


def test_a_row_shows_machine_drift_against_its_baseline() -> None:
    slow = CEILING | {"matmul_flops_per_s": 0.8e11}
    (row,) = tables([strong(0.1, 1), strong(0.05, 2, changes={"ceiling": [CEILING, slow]})])[0]
    assert row["machine drift"] == "25.0%"


def test_fewer_threads_per_rank_are_explained_by_the_split_of_the_cores() -> None:
    actual = "processors and devices differ: threads per rank, 2 on 1 device, 1 on 2 devices,"
    assert f"> - row 1: {actual} because the ranks share the cores" in text(
        on_threads({1: 2, 2: 1})
    )
    (row,) = tables(on_threads({1: 2, 2: 1}))[0]
    # Equal steps on half the cores each: half the ideal speed-up, and nothing is lost.
    assert row["efficiency"].startswith("50.0%")
    assert (row["1/n"], row["lost beyond 1/n"], row["lost share"]) == ("50.0%", "0.0%", "50.0%")
    assert "**Strong scaling on the same cores.** More devices are no more hardware here" in text(
        on_threads({1: 2, 2: 1})
    )
    assert "machine drift" not in row, "other threads have other ceilings"
    laws = tables(on_threads({1: 4, 2: 2, 4: 1}))[1]
    assert all("the same cores: most of it is their split" in law["remark"] for law in laws)
    for other in (on_threads({1: 1, 2: 2}), on_threads({1: 2, 2: 1}, device="H200")):
        assert "processors and devices differ: cpu Example 9000" in text(other)
    moved = [*on_threads({1: 2}), *on_threads({2: 1}, cpu="Other")]
    assert text(moved) == "", "another processor is another curve"


# ---------------------------------------------------------------------------------- the map


def fastest(runs: Sequence[Run], swept: Sequence[Cell] = ()) -> list[dict[str, str]]:
    """Rows of the table of configurations that do the same work."""
    (rows,) = read_all(fastest_blocks(compare_strategies(runs, CERTIFICATES, swept)))
    return rows


def standings(runs: Sequence[Run], swept: Sequence[Cell] = ()) -> dict[str, str]:
    return {row["configuration"]: row["standing"] for row in fastest(runs, swept)}


def map_of(runs: Sequence[Run], certificates: Sequence[Certificate] = CERTIFICATES) -> str:
    return "\n".join(fastest_blocks(compare_strategies(runs, certificates)))


def test_the_map_names_the_fastest_and_has_a_column_per_candidate() -> None:
    runs = [way("ddp", 0.05, noise=0), way("zero1", 0.1, noise=0)]
    slow = [way("zero1", 0.1, precision="bf16-mixed"), way("fsdp1", 0.01, precision="bf16-mixed")]
    first, second, *unproven = fastest([*runs, *slow])
    assert first == {
        "group": "1",
        "precision": "32-true",
        "global batch": "8",
        "devices": "2",
        "FLOPs": "32.4 kFLOP per token",
        "launches": "1",
        "flags": "none",
        "configuration": "**ddp**",
        "speed": "1,280 tokens/s (1,280 to 1,280)",
        "ratio": "",
        "standing": "fastest",
        "record": "[record](runs/ddp.json)",
    }
    assert (second["ratio"], second["standing"]) == ("0.500 (0.500 to 0.500)", "slower")
    assert [(row["group"], row["configuration"], row["standing"]) for row in unproven] == [
        ("2", "fsdp1", "not ranked"),
        ("2", "zero1", "not ranked"),
    ]


def cell(config: RunConfig | None, status: Status, run: Run | None = None, **options: str) -> Cell:
    actual = {"batch-size": "4", "devices": "2"} | options
    hashed = hashlib.sha256(repr((actual, status)).encode()).hexdigest()[:12]
    outcome = CellOutcome(
        cell=hashed,
        repeat=1,
        recipe="gpt",
        options=actual,
        command="",
        status=status,
        config=config,
    )
    return Cell(name=f"s/cells/{outcome.name}/outcome.json", outcome=outcome, run=run)


def spread(strategy: str) -> RunConfig:
    return way(strategy, 0.1).config


def test_a_candidate_without_a_steady_run_shows_its_status() -> None:
    ran = way("ddp", 0.05)
    swept = [
        cell(ran.config, "ok", ran, strategy="ddp"),
        cell(spread("zero1"), "oom", strategy="zero1"),
        # A refused cell has no config; its options show where it belongs.
        cell(None, "refused", strategy="zero2"),
        cell(None, "refused", strategy="zero2", **{"batch-size": "8"}),
    ]
    runs = [ran, way("fsdp", 0.05, steps=3)]
    assert standings(runs, swept) == {
        "**ddp**": "fastest",
        "zero1": "oom",
        "zero2": "refused",
        "fsdp": "not steady",
    }


def test_the_map_has_a_row_where_one_strategy_or_none_fits() -> None:
    fits = way("zero1", 0.05)
    swept = [cell(spread("ddp"), "oom", strategy="ddp"), cell(fits.config, "ok", fits)]
    (comparison,) = compare_strategies([fits], CERTIFICATES, swept)
    assert [way.name for way in comparison.candidates] == ["zero1"]
    assert list(comparison.missing) == ["ddp"]
    full = [swept[0], cell(spread("zero1"), "oom-inferred", strategy="zero1")]
    assert standings([], full) == {"ddp": "oom", "zero1": "oom-inferred"}
    assert compare_strategies([], CERTIFICATES, swept[:1]) == []


def test_an_interval_ending_near_1_has_enough_digits_to_exclude_a_tie() -> None:
    near = Estimate(value=1.16, low=1.0004, high=1.33)
    assert run_formatting.ratio(near, 2) == "1.1600 (1.0004 to 1.3300)"
    assert run_formatting.ratio(replace(near, low=1.0), 2) == "1.16 (1.00 to 1.33)", "that is a tie"
    assert run_formatting.ratio(replace(near, low=1.01), 2) == "1.16 (1.01 to 1.33)"


def test_the_map_lists_device_counts_by_batch_size() -> None:
    def both(devices: int, batch_size: int) -> list[Run]:
        own = {"devices": devices, "batch_size": batch_size}
        return [make_spread(0.1, strategy=name, **own) for name in ("ddp", "zero1")]

    rows = fastest([*both(2, 8), *both(4, 2)])
    found = dict.fromkeys((row["global batch"], row["devices"]) for row in rows)
    assert list(found) == [("8", "4"), ("16", "2")]


def test_a_tie_is_named_and_an_unproven_candidate_is_struck_out_with_its_reason() -> None:
    runs = [
        way("ddp", 0.05, changes={"flags": ["it was hot"]}),
        way("zero1", 0.0503),
        way("fsdp", 0.02),
        way("fsdp1", 0.01),
    ]
    assert standings(runs) == {
        "ddp": "fastest, in a tie",
        "zero1": "tie",
        "fsdp1": "not ranked",
        "fsdp": "not ranked",
    }
    rows = {row["configuration"]: row for row in fastest(runs)}
    assert rows["ddp"]["flags"] == "it was hot"
    assert re.match(r"[4-6]\.\d+ \(.*\)$", rows["fsdp1"]["ratio"])
    actual = map_of(runs)
    assert "- Loss parity: equal on 2 devices, [certificate](runs/parity.json) (ddp" in actual
    assert (
        "- Not ranked: **different** on 2 devices, [certificate](runs/parity.json) (fsdp in group "
        "1); no certificate of loss parity covers it (fsdp1 in group 1)."
    ) in actual


def proven(**code: Any) -> list[Certificate]:
    """`CERTIFICATES` made by other code."""
    content = make_certificate(results=[*RESULTS, ZERO1], code=CLEAN | code)
    return [read_certificate(content, "runs/parity.json")]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ({"is_dirty": True}, "of a tree with changes that were not committed"),
        ({"is_dirty": None}, "of a tree perhaps with changes that were not committed"),
        ({"commit": "fedcba987654321"}, "of commit fedcba987654, measured at 0123456789ab"),
    ],
)
def test_a_proof_by_other_code_has_a_remark(code: dict[str, Any], expected: str) -> None:
    runs = [way("ddp", 0.05), way("zero1", 0.1)]
    words = "- The proof may be of other code: its certificate is"
    assert f"{words} {expected} (ddp, zero1 in group 1)." in map_of(runs, proven(**code))
    assert words not in map_of(runs, proven())


def test_the_fastest_is_a_guess_in_the_map_while_a_rival_has_no_interval() -> None:
    runs = [way("ddp", 0.05), way("zero1", 0.1, steps=10)]
    assert standings(runs) == {"ddp": "best guess", "zero1": "not confirmed: no interval"}


def test_equal_runs_give_equal_tables_in_any_order() -> None:
    runs = [strong(0.1, 1), way("ddp", 0.05), way("zero1", 0.06), way("fsdp", 0.04, steps=10)]
    assert map_of(runs) == map_of(runs[::-1])
    assert text(runs) == text(runs[::-1])
    assert len(tables(runs)) == len(fastest(runs[1:])) - 2, "strict: rows have all cells"


# ---------------------------------------------------------------------------------- pooled scatter


def test_two_launches_have_the_interval_of_the_scatter_of_all_configurations() -> None:
    steps_s = (0.1, 0.104)
    many = [run for name in ("ddp", "zero1", "zero2", "fsdp") for run in repeated(name, *steps_s)]
    alone, pooled = pool(many[:2]), pool(many)
    assert [point.is_pooled for point in (*alone, *pooled)] == [False, *[True] * 4]
    # Two launches 4 % apart differ by 2.8 % each, more or less; four of such pairs have t = 2.78.
    (scatter,) = find_scatters(many).values()
    assert scatter.freedom == 4
    assert scatter.deviation == pytest.approx(math.log(1.04) / math.sqrt(2), rel=0.3)
    half = 2.776 * scatter.deviation / math.sqrt(2)
    for point in pooled:
        assert point.rate.log_half_width == pytest.approx(half, rel=1e-3)
    wide = alone[0].rate.log_half_width
    assert wide is not None
    assert wide > 2 * half


def test_five_launches_have_an_interval_of_their_own_and_other_models_are_not_pooled() -> None:
    five = repeated("ddp", *(0.1 + 0.001 * number for number in range(5)))
    (point,) = pool(five)
    assert not point.is_pooled
    assert point.rate.low is not None
    pairs = [run for name in ("ddp", "zero1") for run in repeated(name, 0.1, 0.104)]
    other = [of_size(run, f"large-{number}", 32) for number, run in enumerate(pairs)]
    assert find_scatters([*pairs, *other]) == {}, "two degrees of freedom each"


def test_a_pooled_interval_decides_for_single_launches_too() -> None:
    others = [run for n in (2, 4, 8) for run in repeated("zero2", 0.1, 0.101, batch_size=n)]
    more = [run for n in (2, 8) for run in repeated("fsdp", 0.1, 0.101, batch_size=n)]
    lead = [way("ddp", 0.05), way("zero1", 0.1, changes={"ceiling": [None, CEILING]})]
    assert not only(lead).ranked[1].is_slower
    (comparison,) = [
        found
        for found in compare_strategies([*lead, *others, *more], CERTIFICATES)
        if len(found.ranked) > 1
    ]
    assert comparison.ranked[1].is_slower
