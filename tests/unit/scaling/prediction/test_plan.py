"""Tests the plan of one run for a hardware that is not here."""

import pytest

from scaling.prediction.plan import main


def plan(line: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(line.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:15].strip(): line[16:] for line in lines}


def test_a_plan_is_for_the_gpus_of_the_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    line = "mi300x-8 gpt -- --size 6.7b --devices 8 --batch-size 1 --max-steps 1000"
    found = plan(line, capsys)
    assert found["devices"].startswith("1 x 8 cuda, bf16-mixed")
    assert found["strategy"].startswith("ddp: ")  # 99 GiB of states fit in 179
    assert "with a tenth left free" in found["strategy"]
    assert "leaves a twentieth for fragmentation" in found["strategy"]
    assert found["memory"].startswith("fits: ")
    assert found["run"].startswith("1,000 steps in ")
    smaller = plan(line.replace("mi300x-8", "h100-sxm-8"), capsys)
    assert smaller["strategy"].startswith("fsdp: ")


def test_a_run_that_does_not_fit_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan("h100-sxm-8 gpt -- --size 13b --strategy ddp --batch-size 1", capsys)
    assert found["memory"].startswith("does not fit: a device needs ")
    assert not found.keys() & {"step", "speed", "run"}


def test_a_plan_that_does_not_fit_begins_with_the_largest_batch_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "h100-sxm-8 gpt --nodes 2 --devices 8 -- --size 1.3b"
    assert main(line.split()) == 0
    warning = capsys.readouterr().out.splitlines()[0]
    assert warning.startswith("warning: does not fit: a device needs 293.83 GiB, and about ")
    assert "and has 79.11 GiB; the largest batch per device that fits is " in warning
    largest = int(warning.rpartition(" ")[2])
    assert warning.endswith(f": give --batch-size {largest}")
    assert plan(f"{line} --batch-size {largest}", capsys)["memory"].startswith("fits: ")
    assert plan(f"{line} --batch-size {largest + 1}", capsys)["memory"].startswith("does not fit")


@pytest.mark.parametrize(
    ("options", "fixes"),
    [
        ("--strategy ddp", "--activation-checkpointing full or --strategy fsdp or more devices"),
        ("--activation-checkpointing full --strategy fsdp --devices 2", "more devices"),
        (
            "--activation-checkpointing full --strategy ddp --precision 16-mixed",
            "--strategy fsdp1 or more devices",
        ),
    ],
)
def test_where_no_batch_fits_a_plan_says_what_else_to_change(
    options: str, fixes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"h100-sxm-8 gpt -- --size 13b {options}".split()) == 0
    warning = capsys.readouterr().out.splitlines()[0]
    assert f"; no batch fits: try {fixes}; `python -m scaling predict" in warning


def test_nodes_of_a_job_count_unless_the_recipe_says(capsys: pytest.CaptureFixture[str]) -> None:
    job = "h100-sxm-8 vit --nodes 3 --devices 4 --"
    assert plan(job, capsys)["devices"].startswith("3 x 4 cuda")
    assert plan(f"{job} --num-nodes 2", capsys)["devices"].startswith("2 x 4 cuda")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("h100 gpt --", "hardware h100 is unknown; did you mean h100-sxm-8?"),
        ("h200-sxm-8 gpt -- --batch-size 0", "batch-size is 0; it must be at least 1"),
        ("h200-sxm-8 gpt -- --devices 16", "devices is 16, and a node of h200-sxm-8 has 8"),
        ("h200-sxm-8 gpt -- --model.num-heads 7", "does not divide into model.num-heads 7"),
        ("h200-sxm-8 gpt -- --accelerator cpu", "accelerator is cpu, which h200-sxm-8 is not"),
        ("h200-sxm-8 gpt -- --sise 1b", "--sise is not an option; did you mean --size?"),
    ],
)
def test_bad_input_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
