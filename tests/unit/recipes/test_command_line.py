"""Tests the command line: options, defaults, and where a run writes its files."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import bert, gpt, vit
from recipes.command_line import run_recipe
from recipes.options import build_config, build_parser, parse
from recipes.presets import Preset, suggest
from unitransformer.checkpoint.callbacks import lock_folder
from unitransformer.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from unitransformer.costs.flops import count_parameters
from unitransformer.launch import devices
from unitransformer.launch.variables import RUN_FOLDER
from unitransformer.record.parameter_summary import human_count
from unitransformer.record.schema import config_of, load_record

PRESETS = (bert.PRESET, gpt.PRESET, vit.PRESET)
TINY = (
    "--model.width 16 --model.num-layers 1 --model.num-heads 2 --model.feedforward-width 32 "
    "--model.num-classes 300 --model.num-positions 8 --batch-size 2 --max-steps 2 "
    "--accelerator cpu --data text.txt --ceiling-s 0"
)


def name_of(preset: Preset) -> str:
    return preset.recipe


def config_for(line: str, preset: Preset = gpt.PRESET) -> RunConfig:
    """The config of `line` on a CPU."""
    return build_config(parse(preset, shlex.split(line)), defaults=preset.cpu, devices=1)


Call = Callable[[str], str]


@pytest.fixture
def folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder, which holds only text.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNITRANSFORMER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    lines = (f"{a} times {b} makes {a * b}\n" for a in range(40) for b in range(20))
    Path("text.txt").write_text("".join(lines))


@pytest.fixture
def call(folder: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a line with GPT in a folder that holds only text.txt; returns its output."""

    def run(line: str) -> str:
        monkeypatch.delenv(RUN_FOLDER, raising=False)
        capsys.readouterr()
        code = run_recipe(gpt.PRESET, gpt.show, shlex.split(line))
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


# ---- what options mean


def test_no_option_gives_the_default_run_of_the_recipe() -> None:
    config = config_for("", bert.PRESET)
    assert (config.size, config.model) == ("reference", bert.model_config())
    assert (config.batch_size, config.max_steps, config.validate_every) == (64, 600, 150)
    assert config.optimizer.learning_rate == 2e-3
    assert config.parallel.precision == "32-true"
    assert config.seed == 0


@pytest.mark.parametrize(
    ("line", "preset", "on_cpu", "on_gpu"),
    [
        ("", gpt.PRESET, 0, 0),
        ("--size 124m", gpt.PRESET, 0, 128),
        ("--size base", bert.PRESET, 0, 128),
        ("--size b", vit.PRESET, 0, 0),
        ("--size 124m --pad-vocabulary 0", gpt.PRESET, 0, 0),
        ("--pad-vocabulary 64", gpt.PRESET, 64, 64),
    ],
)
def test_gpus_pad_the_vocabulary_of_named_sizes(
    line: str, preset: Preset, on_cpu: int, on_gpu: int
) -> None:
    command = parse(preset, shlex.split(line))
    configs = [
        build_config(command, defaults=kind, devices=1) for kind in (preset.cpu, preset.cuda)
    ]
    assert [config.pad_vocabulary for config in configs] == [on_cpu, on_gpu]


@pytest.mark.parametrize("preset", PRESETS, ids=name_of)
def test_every_field_of_model_and_optimizer_has_an_option(preset: Preset) -> None:
    flags = {flag for action in build_parser(preset)._actions for flag in action.option_strings}
    for kind, group in ((ModelConfig, "model"), (OptimizerConfig, "optimizer")):
        for name in kind.__dataclass_fields__:
            assert f"--{group}.{name.replace('_', '-')}" in flags


def test_the_last_value_of_an_option_wins() -> None:
    config = config_for("--max-steps 9 --seed 1 --max-steps 11 --model.dropout 0.1 --seed 2")
    assert (config.max_steps, config.seed) == (11, 2)


def test_dropout_is_short_for_model_dropout() -> None:
    assert config_for("--dropout 0.3").model.dropout == 0.3
    assert config_for("--model.dropout 0.3 --dropout 0.3").model.dropout == 0.3


def test_a_single_field_changes_and_the_rest_of_the_size_stays() -> None:
    model = config_for("--size 124m --model.num-layers 2").model
    assert model == gpt.model_config("124m", num_layers=2)
    assert (model.width, model.num_layers) == (768, 2)


def test_a_switch_of_the_model_takes_true_and_false() -> None:
    assert config_for("--model.final-norm true").model.final_norm
    assert not config_for("--size 124m --model.final-norm false").model.final_norm


def test_another_image_size_sets_the_number_of_positions() -> None:
    config = config_for("--model.image-size 64 --model.patch-size 16", vit.PRESET)
    assert config.model.num_positions == 17


def test_a_run_cut_short_follows_the_beginning_of_the_whole_schedule() -> None:
    assert config_for("--max-steps 5").optimizer.schedule_steps == gpt.PRESET.cpu.max_steps
    assert config_for("--max-steps 5000").optimizer.schedule_steps == 5000
    assert config_for("--optimizer.schedule-steps 7").optimizer.schedule_steps == 7


def test_validation_runs_four_times_by_default() -> None:
    assert config_for("--max-steps 40").validate_every == 10
    assert config_for("--max-steps 3").validate_every == 1
    assert config_for("--max-steps 40 --validate-every 7").validate_every == 7


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("refrence", ["base", "reference"], "did you mean reference?"),
        ("xyz", ["base", "large"], "known: base, large"),
    ],
)
def test_a_near_name_is_suggested_and_otherwise_all(
    name: str, known: list[str], message: str
) -> None:
    assert suggest(name, known) == message
    alternative = message if message.startswith("did you mean") else "no idea"
    assert suggest(name, known, otherwise="no idea") == alternative


# ---- a file of options


def test_a_config_file_equals_the_same_options(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("max_steps: 7\nmodel:\n  dropout: 0.25\noptimizer:\n  learning_rate: 1e-4\n")
    expected = config_for("--max-steps 7 --model.dropout 0.25 --optimizer.learning-rate 1e-4")
    assert config_for(f"--config {file}") == expected


def test_options_after_a_config_file_override_it_and_options_before_do_not(
    tmp_path: Path,
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("max_steps: 7\n")
    assert config_for(f"--config {file} --max-steps 9").max_steps == 9
    assert config_for(f"--max-steps 9 --config {file}").max_steps == 7


@pytest.mark.parametrize("preset", PRESETS, ids=name_of)
def test_a_printed_config_fed_back_is_the_same_run(
    preset: Preset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = (
        "--model.num-layers 2 --dropout 0.3 --max-steps 5 --seed 3 --optimizer.learning-rate 3e-5 "
        "--strategy ddp --devices 2 --compile default --num-workers 0 --precision bf16-true"
    )
    with pytest.raises(SystemExit) as stopped:
        parse(preset, [*shlex.split(line), "--print_config"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert yaml.safe_load(printed)["model"]["num_layers"] == 2
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    assert config_for(f"--config {file}", preset) == config_for(line, preset)
    assert config_for(f"--config {file}", preset).hash() == config_for(line, preset).hash()


def test_a_record_holds_the_encoding_and_the_field_of_its_text(call: Call) -> None:
    lines = (json.dumps({"body": f"déjà {n} élèves"}, ensure_ascii=False) for n in range(500))
    Path("pages.jsonl").write_text("\n".join(lines), encoding="latin-1")
    call(f"{TINY} --data pages.jsonl --data-encoding latin1 --data-field body --record run.json")
    record = load_record(Path("run.json"))
    data = config_of(record).data
    assert (data.source, data.encoding, data.field) == ("pages.jsonl", "iso8859-1", "body")
    description = "pages.jsonl, 1 file, 13.9 kB, iso8859-1, field body of 1 JSON Lines file"
    assert record["data"]["description"] == description
    assert "--data-encoding latin1 --data-field body" in record["command"]


# ---- asking without training


def test_a_dry_run_says_what_would_run_and_writes_nothing(call: Call) -> None:
    before = files()
    plan = call(f"{TINY} --dry-run --accumulate 3 --seed 5")
    assert files() == before
    fields = {line[:15].strip(): line[16:] for line in plan.splitlines()}
    assert fields["model"] == "gpt reference, 12,124 parameters"
    assert fields["data"] == "text.txt"
    assert fields["devices"] == "1 x 1 cpu, single, 32-true, compile off"
    assert fields["batch"] == "6 = 2 per device x 3 micro-batches x 1 device"
    assert fields["steps"] == "2"
    assert "matmul_causal" in fields["FLOPs per token"]
    assert fields["folder"].startswith("runs/gpt-reference-")
    assert fields["checkpoint"] == fields["folder"] + "/checkpoints"
    assert Path(fields["record"]).parent == Path(fields["folder"])


@pytest.mark.parametrize(
    ("options", "memory", "strategy", "why"),
    [
        ("--accelerator cpu", 2**36, "ddp", "fit in the 64 GiB per device, with a tenth"),
        ("--accelerator cpu", 2**16, "fsdp", "sharded over 4 devices they may still not fit"),
        ("", 2**16, "fsdp1", "fsdp1, as fsdp and hsdp do not scale losses for 16-mixed"),
        (
            "--cpu-offload",
            2**36,
            "fsdp1",
            "in host memory; single and ddp keep it on the device; fsdp1, as fsdp",
        ),
        (
            "--cpu-offload --precision 32-true",
            2**36,
            "fsdp",
            "single and ddp keep it on the device",
        ),
    ],
)
def test_auto_explains_its_choice_for_several_ranks(
    options: str, memory: int, strategy: str, why: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 4)  # that computes in float16, not in bf16
    monkeypatch.setattr(devices, "has_bf16", lambda: False)
    monkeypatch.setattr(devices, "check_kernels", lambda _: None)
    monkeypatch.setattr(devices, "device_memory_bytes", lambda *_: memory)
    output = call(f"{TINY} --dry-run --devices 4 --accelerator auto {options}")
    line = output.splitlines()[0]
    assert line.startswith(f"strategy {strategy}: ")
    assert why in line
    assert f"\nstrategy        {line.removeprefix('strategy ')}\n" in output
    assert f", {strategy}, " in output  # device and precision


def test_a_run_on_the_cpu_does_not_initialize_the_driver_of_a_gpu(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise AssertionError("ranks are forked, and could not use the driver any more")

    monkeypatch.setattr(devices, "count_gpus", fail)
    assert " 1 x 2 cpu, " in call(f"{TINY} --dry-run --devices 2 --accelerator cpu")


def test_device_and_strategy_are_decided_once(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    decided = []
    find_device = devices.choose_device

    def find_and_count(parallel: ParallelConfig) -> str:
        decided.append(parallel)
        return find_device(parallel)

    monkeypatch.setattr(devices, "choose_device", find_and_count)
    call(TINY)
    assert len(decided) == 1


def test_a_dry_run_names_the_given_paths(call: Call) -> None:
    plan = call(f"{TINY} --dry-run --out elsewhere --checkpoint-dir kept --record record/it.json")
    assert "folder          elsewhere/gpt-reference-" in plan
    assert "checkpoint      kept\n" in plan
    assert "record          record/it.json" in plan


def test_a_dry_run_for_a_hardware_plans_its_gpus_and_not_this_machine(
    call: Call, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    before = files()
    plan = call("--size 1.3b --batch-size 1 --dry-run --hardware h200-sxm-8")
    assert files() == before
    assert "\ndevices         1 x 8 cuda, bf16-mixed" in plan
    assert "\nmemory          fits: " in plan


def test_the_summary_of_a_size_writes_nothing(call: Call) -> None:
    before = files()
    table = call("--summary --size 124m --model.num-layers 2")
    model = gpt.model_config("124m", num_layers=2)
    assert files() == before
    assert "transformer_layers.1.feedforward" in table
    assert "transformer_layers.2" not in table
    assert f"{human_count(count_parameters(model))}" in table.splitlines()[-2]


# ---- what a run leaves


def test_a_run_writes_record_checkpoint_logs_and_figure_where_it_prints(call: Call) -> None:
    out = call(f"{TINY} --record not/there/yet.json")
    (folder,) = Path("runs").iterdir()
    record = load_record(Path("not/there/yet.json"))
    assert record["status"] == "ok"
    assert config_of(record).model.width == 16
    assert shlex.split(record["command"])[:3] == ["python", "-m", "recipes.gpt"]
    for made in ("checkpoints/step-00000002", "csv", "tensorboard", "figures/loss.png"):
        assert (folder / made).exists()
    assert f"record      {Path('not/there/yet.json')}" in out
    assert f"checkpoint  {folder / 'checkpoints'}" in out
    assert {path.parts[0] for path in Path().rglob("*")} == {"text.txt", "runs", "not"}


def test_a_run_of_one_step_has_no_curve_and_does_not_import_matplotlib(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "unitransformer.plots", None)  # importing it is an error
    out = call(f"{TINY} --max-steps 1")
    assert out.splitlines()[-1] == "figures     none: a loss curve needs two steps"


def test_a_second_run_gets_a_new_folder_and_a_resumed_run_continues_in_its_own(call: Call) -> None:
    for _ in range(2):
        call(TINY)
    first, second = sorted(Path("runs").iterdir())
    assert [first.name[-2:], second.name[-2:]] == ["-1", "-2"]
    out = call(f"{TINY} --max-steps 3 --resume")
    assert f"resume  {second / 'checkpoints' / 'step-00000002'}, after step 2" in out
    kept = sorted(path.name for path in (second / "checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000003"]
    records = [json.loads(path.read_text()) for path in second.glob("*.json")]
    assert sorted(len(record["loss"]) for record in records) == [2, 3]


def test_a_run_resumed_from_the_path_of_a_checkpoint_continues_in_its_folder(call: Call) -> None:
    for _ in range(2):
        call(f"{TINY} --max-steps 4 --checkpoint-every 2")
    first, second = sorted(Path("runs").iterdir())
    whole = json.loads(next(first.glob("*.json")).read_text())
    out = call(f"{TINY} --max-steps 4 --resume {first}/checkpoints/step-00000002")
    assert "checkpoints/step-00000002, after step 2" in out
    assert f"resume  moves step-00000004 to {(first / 'checkpoints/set-aside').absolute()}" in out
    assert sorted(Path("runs").iterdir()) == [first, second]
    record = max((json.loads(p.read_text()) for p in first.glob("*.json")), key=_segments)
    assert record["segment_starts"] == [0, 2]
    assert record["loss"] == whole["loss"]


def _segments(record: dict[str, Any]) -> int:
    return len(record["segment_starts"])


def test_a_run_resumed_from_a_checkpoint_elsewhere_writes_into_its_own_folder(call: Call) -> None:
    call(f"{TINY} --max-steps 4 --checkpoint-every 2 --checkpoint-dir one")
    call(f"{TINY} --max-steps 4 --checkpoint-dir two --resume one/step-00000002")
    assert [path.name for path in Path("two").glob("step-*")] == ["step-00000004"]
    assert len(list(Path("one").glob("step-*"))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--keep-checkpoints 0", "keep-checkpoints is 0; it must be at least 1"),
        ("--keep-checkpoints -1", "keep-checkpoints is -1; it must be at least 1"),
        (
            "--no-checkpoint --keep-checkpoints 3",
            "no-checkpoint saves nothing but --keep-checkpoints needs checkpoints; leave one out",
        ),
    ],
)
def test_an_impossible_number_of_checkpoints_is_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config_for(line)


@pytest.mark.parametrize("seed", [20_240_101, 2**32 - 1])
def test_a_large_seed_trains_with_dropout(call: Call, seed: int) -> None:
    assert "validation  loss" in call(f"{TINY} --dropout 0.1 --seed {seed}")


def test_bf16_mixed_clips_gradients_on_a_cpu(call: Call) -> None:
    assert "validation  loss" in call(f"{TINY} --precision bf16-mixed")


# ---- measuring


@pytest.mark.parametrize(("word", "share"), [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02)])
def test_an_interval_is_a_fraction_or_a_percentage(word: str, share: float) -> None:
    assert config_for(f"--until-interval '{word}'").until_interval == pytest.approx(share)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "--until-interval wide",
            "until-interval is 'wide'; it must be a fraction, for example 1% or 0.01",
        ),
        ("--until-interval 200%", "until-interval is 2.0; it must be between 0 and 1"),
        ("--ceiling-s -1", "ceiling-s is -1.0; it must be at least 0"),
        ("--repeats 0", "repeats is 0; it must be at least 1"),
    ],
)
def test_an_impossible_interval_target_is_refused(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config_for(line)


def test_training_continues_until_the_median_is_known(call: Call) -> None:
    out = call(f"{TINY} --max-steps 2000 --until-interval 90% --validate-every 2000")
    (path,) = Path("runs").glob("*/*.json")
    record = load_record(path)
    steps = len(record["step_s"])
    assert record["status"] == "ok"
    assert 64 <= steps < 2000
    figures = record["metrics"]
    assert figures["high_step_s"] - figures["low_step_s"] < 0.9 * figures["median_step_s"]
    assert record["validation"]["history"][-1]["step"] == steps, "the last step is validated"
    assert (path.parent / "checkpoints" / f"step-{steps:08}").is_dir(), "and saved"
    assert f"step {steps:>4}/2000" in out


def test_a_run_records_its_rate_and_the_measured_ceiling(call: Call) -> None:
    out = call(f"{TINY} --max-steps 14 --validate-every 14 --ceiling-s 0.05")
    (path,) = Path("runs").glob("*/*.json")
    record = load_record(path)
    (ceiling,) = record["ceiling"]
    assert ceiling["matmul_flops_per_s"] > 0
    row = next(row for row in record["mfu"] if row["convention"] == "matmul")
    if row["flops_per_s"] is not None:  # steady despite other load
        share = row["flops_per_s"] / ceiling["matmul_flops_per_s"]
        assert row["share_of_ceiling"] == pytest.approx(share)
        assert f"{share:.1%} of the ceiling measured in this run" in out
    assert row["utilisation"] is None
    is_steady = row["flops_per_s"] is not None
    assert ("no published peak" if is_steady else "no steady state") in row["reason"]


def test_a_trace_is_written_and_its_steps_are_excluded(call: Call) -> None:
    out = call(f"{TINY} --max-steps 9 --validate-every 9 --trace there/trace")
    (path,) = Path("runs").glob("*/*.json")
    assert {item.name for item in Path("there/trace").iterdir()} == {
        "shares-rank0.json",
        "trace-rank0.json.gz",
    }
    unsteady = {item["step"]: item["reason"] for item in load_record(path)["excluded_steps"]}
    counted, traced = "tensor bytes counted", "traced"
    assert unsteady == {2: counted, 3: counted, 5: traced, 6: traced, 7: traced}
    assert "traced      matrix multiply" in out


def test_peak_tensor_bytes_repeat_exactly(call: Call) -> None:
    for _ in range(2):
        call(f"{TINY} --max-steps 4 --validate-every 4")
    first, second = (load_record(path) for path in sorted(Path("runs").glob("*/*.json")))
    assert first["peak_bytes"] == second["peak_bytes"]
    assert first["peak_bytes"][0] > 4 * 4 * first["num_parameters"], "weights, gradients, moments"


def test_every_repeat_is_a_launch_with_a_record(
    folder: None,
    capfd: pytest.CaptureFixture[str],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(repository))
    arguments = shlex.split(f"{TINY} --repeats 2")
    assert run_recipe(gpt.PRESET, gpt.show, arguments) == 0
    out = capfd.readouterr().out
    first, second = sorted(Path("runs").glob("*/*.json"))
    assert [first.stem[-2:], second.stem[-2:]] == ["-1", "-2"]
    assert load_record(first)["config"] == load_record(second)["config"]
    assert load_record(first)["loss"] == load_record(second)["loss"]
    assert "--repeats" not in load_record(first)["command"]
    assert out.index("launch 1 of 2") < out.index("launch 2 of 2")
    assert "launches    launch 1 has no steady state: 2 steps, needs 8" in out


@pytest.mark.parametrize("option", ["--record x.json", "--checkpoint-dir x", "--trace x"])
def test_repeats_into_one_record_are_refused(
    option: str, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_recipe(gpt.PRESET, gpt.show, shlex.split(f"{TINY} --repeats 2 {option}")) == 2
    name = option.split()[0]
    message = f"error: repeats is 2 and {name} is one path for all launches; leave {name} out\n"
    assert capsys.readouterr().err == message
    assert not Path("runs").exists()


def test_a_second_run_on_the_same_checkpoints_is_refused(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock_folder(Path("kept")):
        line = f"{TINY} --checkpoint-dir kept"
        assert run_recipe(gpt.PRESET, gpt.show, shlex.split(line)) == 2
    assert "error: checkpoint-dir kept is in use by another run" in capsys.readouterr().err
    call(f"{TINY} --checkpoint-dir kept")
