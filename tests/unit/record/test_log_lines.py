"""Tests log lines that are built from the samples of a run."""

from dataclasses import replace

from tests.builders.records import make_config
from unitransformer.record.log_lines import log_lines


def test_a_log_line_is_the_median_since_the_previous_line_of_its_launch() -> None:
    config = replace(make_config(num_steps=8), log_every=3)
    lines = log_lines(
        config,
        loss=[4.0, 3.9, 3.8, 3.7, 3.6, 3.5, 3.4, 3.3],
        step_s=[9.0, 0.1, 0.3, 0.5, 7.0, 0.2, 0.3, 0.4],
        segment_starts=[0, 4],
        validation=[{"step": 6, "val_loss": 2.0, "val_accuracy": 0.5}],
    )
    actual = [tuple(part.strip() for part in line.split(" | ")) for line in lines]
    steps = [(place, loss, pace) for place, loss, *_, pace in actual if loss.startswith("loss")]
    assert steps == [
        ("step 1/8", "loss   4.0000", "9000.0 ms/step"),
        ("step 3/8", "loss   3.8000", "200.0 ms/step"),
        ("step 4/8", "loss   3.7000", "500.0 ms/step"),  # the last line of the first launch
        ("step 6/8", "loss   3.5000", "3600.0 ms/step"),
        ("step 8/8", "loss   3.3000", "350.0 ms/step"),
    ]
    assert lines[4].startswith("step 6/8 | validation loss 2.0000")
    assert not any("/s" in line.replace("ms/step", "") for line in lines)
