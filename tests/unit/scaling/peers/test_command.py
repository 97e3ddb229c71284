"""Tests `python -m scaling peers`: what it refuses, what it plans, and one whole comparison."""

import importlib.util
import json
from pathlib import Path

import pytest

from scaling.__main__ import main
from scaling.peers import command
from scaling.peers.record import find_contradictions, read_comparison
from tests.builders.modules import run_here

TINY = (
    "--model.width 32 --model.num-layers 2 --model.num-heads 4 --model.feedforward-width 64 "
    "--model.num-positions 16 --model.num-classes 300"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--recipe gtp", "recipe is 'gtp'; did you mean gpt?"),
        ("--peers plain,nonogpt", "peers holds 'nonogpt'; did you mean nanogpt?"),
        ("--peers timm", "peers holds timm, which does not train gpt; known: plain, nanogpt, gpt2"),
        ("--peers plain --compile fast", "compile holds 'fast'; known: off, default"),
        ("--peers plain --batch-size 8,x", "batch-size holds 'x'"),
        ("--peers plain --batch-size 0", "batch-size holds '0'"),
        ("--peers plain --precision 16-mixed", "precision holds 16-mixed"),
        ("--peers plain --pairs 0", "pairs is 0; it must be at least 1"),
        ("--peers plain --seconds 0", "seconds is 0; it must be above 0"),
        ("--peers plain --seed -1", "seed is -1"),
        ("--peers plain --out /proc/peers", "out /proc/peers"),
        ("--peers plain -- --dropout 0.1", "--dropout after -- is decided by the comparison"),
        ("--peers plain -- --rehearse 8", "--rehearse after -- is decided by the comparison"),
        ("--peers plain -- --batch_size=4", "--batch_size after -- is decided"),
        ("--peers plain --size 124n", "size '124n' is not known; did you mean 124m?"),
        ("--peers plain -- --modle.width 3", "--modle.width is not an option"),
    ],
)
def test_bad_input_is_one_line(
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "run_module", run_here)
    assert main(["peers", *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["peers", "--recipe", "vit"]) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: peers needs transformers and timm, not installed: "
        "pip install 'unitransformer[peers]', or use --peers plain\n"
    )


def test_plain_peers_are_compared_from_start_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--recipe gpt --compile off --batch-size 4 --accelerator cpu --pairs 1"
    arguments = ["peers", *options.split(), "--out", str(tmp_path), "--peers"]
    monkeypatch.setattr(command, "run_module", run_here)  # the networks train in processes
    assert main([*arguments, "plain,nanogpt", "--dry-run", "--", *TINY.split()]) == 0
    assert "2 comparisons of at most 1 pair" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "nanogpt", "--", *TINY.split()]) == 0
    printed = capsys.readouterr().out
    assert "GPT reference trains" in printed
    assert "1 record written" in printed
    (path,) = tmp_path.iterdir()
    comparison = read_comparison(json.loads(path.read_text()), path.name)
    assert comparison.ours is not None
    assert comparison.other is not None
    # The same weights, batches, optimizer and learning rates: the same losses.
    assert comparison.other.first_losses == pytest.approx(comparison.ours.first_losses, 1e-5)
    assert comparison.ours.num_parameters == comparison.other.num_parameters
    assert find_contradictions(comparison) == []
