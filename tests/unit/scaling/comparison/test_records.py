"""Tests verdicts on two folders of records, which were measured at different times."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scaling.comparison.records import CellJudgement, compare_records, judge_launches, worst
from scaling.comparison.verdict import Verdict
from tests.builders.runs import make_spread
from tests.builders.sweeps import write_hung_cell
from unitransformer.record.schema import write_record
from unitransformer.stats.comparisons import LaunchVariance

LAUNCHES = 5


def put(folder: Path, step_s: float, *, launches: int = LAUNCHES, **changes: Any) -> Path:
    """Writes launches whose medians differ by a few thousandths."""
    for number in range(launches):
        run = make_spread(step_s * (1 + number / 2000), f"{folder.name}-{number}", noise=0.01)
        write_record(run.record | changes, folder / f"{number}.json")
    return folder


def compare(base: Path, candidate: Path) -> list[CellJudgement]:
    return compare_records(base, candidate, threshold=0.02, stop_faster=0.1)


def test_equal_launches_are_not_slower(tmp_path: Path) -> None:
    (cell,) = compare(put(tmp_path / "a", 0.1), put(tmp_path / "b", 0.1))
    assert cell.judgement.verdict is Verdict.NOT_SLOWER
    assert (cell.launches, cell.clock) == ((5, 5), "processor")


def test_slower_launches_are_slower(tmp_path: Path) -> None:
    (cell,) = compare(put(tmp_path / "a", 0.1), put(tmp_path / "b", 0.11))
    assert cell.judgement.verdict is Verdict.SLOWER
    assert cell.judgement.ratio == pytest.approx(1.1, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"versions": {"torch": "9.9"}}, "the conditions differ: versions of"),
        ({"hardware": "other cpu"}, "the conditions differ: processors and devices differ"),
        ({"hardware": "other clock"}, "the conditions differ: sm_clock_hz"),
    ],
)
def test_other_conditions_are_inconclusive(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    if "hardware" in changes:
        (host,) = make_spread(0.1).record["hardware"]
        other = {"cpu": "Other 1"} if changes["hardware"] == "other cpu" else {"sm_clock_hz": 1e9}
        changes = {"hardware": [host | other]}
    (cell,) = compare(put(tmp_path / "a", 0.1), put(tmp_path / "b", 0.2, **changes))
    assert cell.judgement.verdict is Verdict.INCONCLUSIVE
    assert cell.judgement.reason is not None
    assert cell.judgement.reason.startswith(reason)


def test_a_machine_that_became_slower_by_20_percent_is_inconclusive(tmp_path: Path) -> None:
    (ceiling,) = make_spread(0.1).record["ceiling"]
    slowed = ceiling | {"matmul_flops_per_s": ceiling["matmul_flops_per_s"] / 1.2}
    candidate = put(tmp_path / "b", 0.12, ceiling=[slowed])
    (cell,) = compare(put(tmp_path / "a", 0.1), candidate)
    assert cell.judgement.verdict is Verdict.INCONCLUSIVE
    assert cell.judgement.reason == "drift: the machine itself reached 20.0% more or less"


def test_records_without_a_ceiling_are_inconclusive(tmp_path: Path) -> None:
    (cell,) = compare(put(tmp_path / "a", 0.1), put(tmp_path / "b", 0.1, ceiling=[None]))
    assert cell.judgement.verdict is Verdict.INCONCLUSIVE
    assert cell.judgement.reason is not None
    assert cell.judgement.reason.startswith("records hold no ceiling")


def test_a_single_launch_is_too_few(tmp_path: Path) -> None:
    (cell,) = compare(put(tmp_path / "a", 0.1), put(tmp_path / "b", 0.2, launches=1))
    assert cell.judgement.reason == "too few launches: an interval takes 2 in each folder"


def test_a_config_of_one_folder_alone_is_inconclusive(tmp_path: Path) -> None:
    other = make_spread(0.1, batch_size=4).record
    write_record(other, tmp_path / "b/other.json")
    cells = compare(put(tmp_path / "a", 0.1), put(tmp_path / "b", 0.1))
    assert [cell.judgement.verdict for cell in cells] == [Verdict.NOT_SLOWER, Verdict.INCONCLUSIVE]
    assert cells[1].judgement.reason == "only one folder holds this config"


def test_a_damaged_or_missing_baseline_is_refused(tmp_path: Path) -> None:
    candidate = put(tmp_path / "b", 0.1, launches=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no run that ended well"):
        compare(tmp_path / "empty", candidate)
    damaged = put(tmp_path / "a", 0.1, launches=2) / "0.json"
    damaged.write_text(damaged.read_text()[:-20])
    with pytest.raises(ValueError, match=r"0.json is damaged: "):
        compare(tmp_path / "a", candidate)


def test_a_run_whose_cell_did_not_end_well_is_no_launch(tmp_path: Path) -> None:
    base, candidate = put(tmp_path / "a", 0.1), put(tmp_path / "b", 0.1)
    write_hung_cell(make_spread(9.0).record, tmp_path / "b" / "sweep")
    (cell,) = compare(base, candidate)
    assert cell.launches == (LAUNCHES, LAUNCHES)


def test_launches_without_an_interval_are_inconclusive() -> None:
    without = LaunchVariance(medians=(1.0, 1.1), reason="launch 1: too few steps")
    judgement = judge_launches(without, without, drift=0.0, threshold=0.02, stop_faster=0.1)
    assert (judgement.verdict, judgement.reason) == (
        Verdict.INCONCLUSIVE,
        "launch 1: too few steps",
    )


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ((Verdict.NOT_SLOWER, Verdict.FASTER), Verdict.FASTER),
        ((Verdict.FASTER, Verdict.INCONCLUSIVE), Verdict.INCONCLUSIVE),
        ((Verdict.INCONCLUSIVE, Verdict.SLOWER), Verdict.SLOWER),
    ],
)
def test_the_worst_cell_decides(verdicts: Sequence[Verdict], expected: Verdict) -> None:
    assert worst(verdicts) is expected
