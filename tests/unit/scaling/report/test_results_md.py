"""Tests RESULTS.md for hand-made records, and the command that writes it."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import pytest

from recipes.gpt import PRESET
from scaling.__main__ import main
from scaling.parity.certificate import describe_bounds
from scaling.parity.certificate_file import read_certificate, write_certificate
from scaling.report.html.page import render_html
from scaling.report.results_md import draw_plots
from scaling.report.rows import rows, to_csv, to_json
from scaling.report.run_formatting import binomial_interval
from scaling.report.sections.runs import draw_architecture
from scaling.report.store_analysis import StoreAnalysis
from scaling.store.reader import Store, UnusedFile, load_store
from tests.builders.certificates import RESULTS, make_certificate
from tests.builders.records import CEILING, HOST, STEP_S, make_config, make_crashed, make_record
from tests.builders.reports import cells, make_store, pages_of, render, results, text_of
from tests.builders.sweeps import make_record_of
from unitransformer.config import ParallelConfig, Precision, Recipe, to_dict
from unitransformer.costs.flops import count_flops
from unitransformer.measure.compile_ledger import CompileLedger
from unitransformer.record.schema import Record, write_record


def three() -> list[Record]:
    return [make_record(recipe) for recipe in ("vit", "gpt", "bert")]


# ---------------------------------------------------------------------------------- the whole


def test_sections_come_in_one_order_whatever_the_order_of_the_records() -> None:
    pages = pages_of(make_store(*three(), make_crashed()))
    assert re.findall("^## (.*)", pages["RESULTS.md"], flags=re.MULTILINE) == [
        "Longest training run of each recipe",
        "BERT",
        "GPT",
        "ViT",
        "More",
        "How to write this file again",
    ]
    inner = ["Architecture", "Parameters", "Speed and memory", "FLOPs and MFU"]
    assert re.findall("^### (.*)", pages["runs.md"], flags=re.MULTILINE) == inner * 3
    conditions = ["Hardware", "Versions", "Commit", "Data", "Runs that failed"]
    assert re.findall("^## (.*)", pages["conditions.md"], flags=re.MULTILINE) == conditions


def test_only_recipes_that_ran_have_a_section() -> None:
    text = render(make_record("vit"))
    assert "## ViT" in text
    assert "## GPT" not in text
    assert cells(text, "recipe") == ["ViT"]


def test_the_first_paragraph_describes_the_report_and_how_to_regenerate_it() -> None:
    text = results(*three())
    opening, ending = text.split("\n## ")[0], text.split("\n## ")[-1]
    assert "3 runs, measured on Example 9000" in opening
    assert "torch 2.13.0" in opening
    assert "generated and never edited" in ending
    assert "```sh\npython -m scaling report . --pages pages\n```" in ending


def test_the_overview_shows_every_value_with_its_unit() -> None:
    text = results(*three())
    assert cells(text, "recipe") == ["BERT", "GPT", "ViT"]
    few = "no interval: 10 samples, an interval needs 50"
    rates = ["160 tokens/s", "160 tokens/s", "20.00 images/s"]
    assert cells(text, "speed") == [f"{rate}; {few}" for rate in rates]
    # 20 images per second, against 1 GFLOP in 10 ms.
    share = 20 * count_flops(make_config("vit"))["matmul"] / 1e11
    assert cells(text, "of the measured ceiling")[2] == f"{share:.1%}"
    assert cells(text, "validation loss") == ["2.0000 nats"] * 3
    assert cells(text, "metric") == ["masked accuracy 50.00%", "perplexity 7.4", "top-1 50.00%"]
    assert cells(text, "trivial baseline")[1] == "predicting a token by its frequency, 2.5000 nats"
    assert cells(text, "peak memory") == ["1.00 GiB (tensors), 1.50 GiB resident"] * 3
    assert cells(text, "steps") == ["12"] * 3
    assert all(cell for cell in cells(text, "dropout"))
    assert cells(text, "baseline beaten")[:2] == [
        "yes, by 25.00 percentage points",
        "yes, by 0.50 nats",
    ]
    (alike,) = re.findall(r"Same for all: (.*?)\n\n", text, flags=re.DOTALL)
    for actual in (
        "MFU: none (a CPU has no published peak; compare with its measured ceiling)",
        "precision: 32-true",
        "devices: 1 x auto, strategy auto",
        "flags: none",
    ):
        assert actual in " ".join(alike.split())
    assert cells(text, "FLOPs")[2].endswith("FLOP per image (`matmul`)")


def test_recipes_are_named_in_one_order_and_a_changed_shape_is_marked() -> None:
    older = {"versions": {"python": "3.10"}}
    records = [make_record("vit"), make_record("bert"), make_record("gpt", **older)]
    assert "\n- BERT, ViT: python" in render(*records).split("## Versions")[1]
    assert cells(render(make_record("gpt")), "size") == ["tiny"]


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, "reference"),
        ({"dropout": 0.0}, "reference"),
        ({"width": 60}, "reference, its shape changed"),
    ],
)
def test_a_size_says_that_its_shape_was_changed_by_whatever_option(
    changes: dict[str, Any], size: str
) -> None:
    model = replace(PRESET.model_config(), **changes)
    config = replace(make_config(), size="reference", model=model)
    command = "python -m recipes.gpt --config small.yaml --model.dropout 0 --data 'x --model.y/z'"
    assert cells(render(make_record_of(config) | {"command": command}), "size") == [size]


@pytest.mark.parametrize(
    "options",
    [
        ["--csv", "x", "--json", "x"],
        ["--out", "R2.md", "--html", "../folder/../folder/R2.md"],
        ["--html", "plots"],
        ["--csv", "RESULTS-pages/runs.md"],
        ["--out", "pages/runs.md", "--pages", "pages"],
    ],
)
def test_no_output_of_a_report_overwrites_another(
    options: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option.replace("folder", Path.cwd().name) for option in options]
    before = sorted(Path().rglob("*"))
    message = error_of(capsys, ["report", str(runs), *options])
    assert "choose another path" in message
    assert sorted(Path().rglob("*")) == before


def test_a_baseline_that_was_not_beaten_is_reported() -> None:
    record = make_record()
    record["validation"]["baseline"]["loss"] = 1.25
    assert cells(render(record), "baseline beaten") == ["**no**, 0.75 nats short"]


def test_an_accuracy_on_few_images_beats_a_baseline_only_outside_of_its_interval() -> None:
    low, high = binomial_interval(0.5, 100)  # Wilson: 0.4038 to 0.5962
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    record = make_record("vit")  # 12 validation batches of 2 images, on one device
    record["validation"]["value"] = 17 / 48
    record["validation"]["baseline"]["accuracy"] = 14 / 48
    (cell,) = cells(render(record), "baseline beaten")
    assert cell.startswith(
        "**not distinguishable**: the 95 % interval of the accuracy on at most 24"
    )
    record["validation"]["value"] = 0.9
    (cell,) = cells(render(record), "baseline beaten")
    assert cell == "yes, by 60.83 percentage points"


def test_conditions_that_differ_name_their_recipes() -> None:
    records = [make_record("bert"), make_record("gpt", code={"commit": None, "is_dirty": None})]
    text = render(*records)
    assert (
        "## Commit\n\n- BERT: 0123456789ab, with uncommitted changes\n"
        "- GPT: unknown: the code ran outside a git checkout\n"
    ) in text
    assert "## Versions\n\n- python 3.11.7, torch 2.13.0\n" in text
    assert "sha256 " + "ab" * 32 in render(*records)


def test_a_blank_value_has_its_reason() -> None:
    record = make_record(step_s=[0.1] * 5, data={"description": "synthetic", "sha256": None})
    record["validation"]["baseline"] = None
    text = render(record)
    reason = "no steady state: 5 steps, needs 8"
    for name in ("speed", "mean speed", "median steady step", "steady state"):
        assert cells(text, name) == [reason]
    assert cells(text, "trivial baseline") == ["none recorded, as for synthetic data"]
    assert cells(text, "baseline beaten") == ["no baseline to compare with"]
    assert "\n- synthetic; no files, so no sha256\n" in text


def test_equal_records_give_an_equal_report_in_any_order() -> None:
    runs = make_store(*three(), make_record("gpt", step_s=STEP_S * 2)).runs
    stores = [Store(runs=order, left_out=()) for order in (runs, runs[::-1])]
    first, second = map(pages_of, stores)
    assert first == second


def test_equal_records_give_equal_plots() -> None:
    longer = make_record(step_s=STEP_S * 2)
    orders = [make_store(longer, make_record()), make_store(make_record(), longer)]
    first, second = (draw_plots(StoreAnalysis(order)) for order in orders)
    assert first == second


def test_plots_hold_no_date_and_no_version() -> None:
    (name, content), *others = draw_plots(StoreAnalysis(make_store(make_record()))).items()
    assert (name, others) == ("gpt-loss.svg", [])
    assert content.startswith(b"<?xml")
    assert b"<dc:date>" not in content
    assert b"Matplotlib v" not in content


def test_hosts_and_absolute_paths_are_not_in_the_report() -> None:
    error = {"type": "OSError", "message": "secret-node-7: /home/jane/data/a.txt is gone"}
    text = render(make_record("bert"), make_crashed(error=error))
    assert "OSError: (host): …/a.txt is gone" in text
    assert "secret-node-7" not in text
    assert "/home/jane" not in text


# ---------------------------------------------------------------------------------- one recipe


def test_the_longest_run_has_a_section_and_the_others_have_a_row() -> None:
    long = make_record(step_s=STEP_S + [0.1] * 8, loss=[1.0] * 20, learning_rate=[1e-3] * 20)
    text = render(make_record(), long, make_record(started_at="2026-02-02"))
    assert cells(text, "steps") == ["20"]
    rows = text.split("### All runs")[1]
    places = [rows.index(f"[record](../runs/{number}.json)") for number in (1, 2, 0)]
    assert places == sorted(places), "the longest, then of equally long ones the newest"
    assert "> These rows were measured under different conditions." in rows
    assert "uncommitted changes (records 1, 2, 3)" in rows


def test_variance_within_and_between_launches_is_reported_separately() -> None:
    noise = random.Random(0)
    step_s = [0.5, 0.3] + [0.1 + 0.01 * noise.random() for _ in range(90)]
    slower = [0.5, 0.3] + [0.12 + 0.01 * noise.random() for _ in range(90)]
    text = render(make_record(step_s=step_s), make_record(step_s=slower))
    (actual,) = cells(text, "launches")
    assert actual.startswith("2: median steps ")
    assert "from launch to launch beyond that" in actual


def test_a_compiled_run_reports_when_compiling_has_paid_off() -> None:
    # 1 s of compiling, 0.1 s saved per step.
    eager = make_record(step_s=[0.5, 0.3] + [0.2] * 10)
    compiled = make_record()
    compiled["config"]["parallel"]["compile"] = "default"
    actual = CompileLedger("off").as_dict() | {"mode": "default", "compile_s": 1.0, "graphs": 1}
    compiled |= {"compile": [actual], "started_at": "2026-02-02"}
    (cell,) = cells(render(eager, compiled), "compile")
    actual = "pays off at step 10: a step takes 100.0 ms, not compiled 200.0 ms; code may not be"
    assert actual in cell, "and in what the two differ"


def test_metrics_of_a_run_come_from_its_raw_steps() -> None:
    text = render(make_record())
    assert cells(text, "steady state")[0].startswith("steps 3 to 12, 10 steps: after the last")
    assert cells(text, "median steady step")[0].startswith(
        "100.0 ms, median absolute deviation 0.0 ms"
    )
    assert cells(text, "where the time goes") == [
        "waiting for data 10.0%, forward and backward 60.0%, optimizer 30.0%"
    ]
    ceiling = "100 GFLOP/s in float32 matrix products, 10 GB/s copied (read and written)"
    assert cells(text, "ceiling of this machine, in this job") == [ceiling]
    flops = re.findall(r"\| `(\w+)`\s*\| ([\d,]+)", text)
    assert {name: float(count.replace(",", "")) for name, count in flops} == {
        name: round(count) for name, count in count_flops(make_config()).items()
    }


def test_the_speed_of_enough_steps_has_an_interval_and_its_flags() -> None:
    # 52 steady steps alternate between 0.1 and 0.2 s: every block holds as many of both.
    record = make_record(step_s=[0.5, 0.3] + [0.1, 0.2] * 26, flags=["the GPU was shared"])
    text = render(record)
    assert cells(text, "speed") == ["107 tokens/s (107 to 107)"]
    assert "95% interval of the median: block bootstrap of 52" in text
    assert cells(text, "flags")[0] == "the GPU was shared"
    assert re.search(r"FLOP/s \([\d.]+ to [\d.]+\)", text), "and so have FLOP/s"
    assert re.search(r"% \([\d.]+% to [\d.]+%\)", text), "and the share of the ceiling"


def test_a_gpu_run_is_compared_with_the_data_sheet_and_its_measured_ceiling() -> None:
    bf16 = CEILING | {"dtype": "bfloat16", "device": "NVIDIA H200"}
    host = HOST | {"device": "NVIDIA H200", "device_memory_bytes": 140 * 2**30}
    record = make_record(hardware=[host], ceiling=[bf16])
    record["config"]["parallel"]["precision"] = "bf16-mixed"
    text = render(record)
    work = 160 * count_flops(make_config())["matmul"]
    (mfu,) = cells(text, "MFU")
    assert mfu == f"{work / 989.5e12:.1%}"
    assert cells(text, "of the measured ceiling") == [f"{work / 1e11:.1%}"]
    assert "Data sheet: 990 TFLOP/s dense in bfloat16, https://" in text


def test_a_compiled_run_reports_what_the_compiler_did() -> None:
    ledger = CompileLedger("off").as_dict() | {
        "mode": "default",
        "start": "cold",
        "compile_s": 12.5,
        "graphs": 2,
        "graph_breaks": [{"step": 0, "where": "a/b.py:7", "reason": "print"}],
        "recompiles": [{"step": 5, "function": "f (a/b.py:1)", "reason": "size changed"}],
    }
    (actual,) = cells(render(make_record(compile=[ledger])), "compile")
    assert actual == (
        "default, cold, 12.5 s of compiling, 2 graphs, 1 graph break, 1 recompile; break at "
        "a/b.py:7: print; step 5: f (a/b.py:1): size changed; when it pays off is unknown: there "
        "is no run like this without compiling"
    )


def test_every_step_that_is_never_steady_is_named_with_the_reason() -> None:
    reasons = {0: "gradients reduced in one bucket", 1: "gradients reduced in one bucket"}
    reasons[6] = "traced"
    excluded = [{"step": step, "reason": reason} for step, reason in reasons.items()]
    (steady,) = cells(render(make_record(excluded_steps=excluded)), "steady state")
    assert steady.endswith(
        "; without steps 1, 2: gradients reduced in one bucket; without step 7: traced"
    )


def test_a_resumed_run_names_the_timed_segment() -> None:
    record = make_record(segment_starts=[0, 2])
    assert "10 steps, in the last of 2 segments" in cells(render(record), "steady state")[0]


def test_the_report_contains_last_log_lines_command_and_summary() -> None:
    text = render(make_record("vit"))
    assert "```\nstep  1/12 | loss   3.0000 | lr 1.50e-05 |    500.0 ms/step\n" in text
    assert "step 12/12 | validation loss 2.0000 | top-1 50.00%\n```" in text
    assert "```sh\npython -m recipes.vit --max-steps 12\n```" in text
    assert "```\n0 | embedding of vit | Embeddings | 800\n```" in text
    assert "![Loss of ViT over the optimizer steps](plots/vit-loss.svg)" in text


def test_the_summary_is_folded() -> None:
    text = render(make_record(summary="\n".join(f"row {row}" for row in range(60))))
    assert "<details>\n<summary>Parameters</summary>\n\n```\nrow 0" in text
    assert "row 59\n```\n\n</details>" in text


def test_a_summary_too_long_for_the_first_page_stands_on_that_of_the_runs() -> None:
    summary = "\n".join(f"row {row}" for row in range(1_000))
    pages = pages_of(make_store(make_record(summary=summary)))
    assert "row 999" not in pages["RESULTS.md"]
    assert "has 1000 lines: [runs.md](pages/runs.md)" in pages["RESULTS.md"]
    assert "row 999" in pages["runs.md"]


# ---------------------------------------------------------------------------------- doubt


def test_a_run_that_crashed_has_a_row_with_its_error() -> None:
    text = render(make_record(), make_crashed("bert"))
    table = text.split("## Runs that failed")[1]
    row = cells(table, "1")
    assert row[0] == "BERT tiny"
    assert row[4:8] == ["12 of 12", "crashed", "RuntimeError: it broke", "[record](../runs/1.json)"]
    assert "# 1\npython -m recipes.bert --max-steps 12\n" in table
    assert "## BERT" not in text


def test_failed_runs_alone_give_a_report() -> None:
    text = render(make_crashed())
    assert "Nothing to compare: no run ended well." in text
    assert draw_plots(StoreAnalysis(make_store(make_crashed()))) == {}


def test_names_that_are_no_utf8_are_linked_and_shown_with_a_question_mark() -> None:
    store = make_store(make_record(command="python -m recipes.gpt --data 'l\udce9'"))
    store = replace(store, runs=(replace(store.runs[0], name="runs/l\udce9/1.json"),))
    pages = pages_of(store)
    assert "[record](runs/l%E9/1.json)" in pages["RESULTS.md"]
    assert "[record](../runs/l%E9/1.json)" in pages["runs.md"]
    assert "--data 'l?'" in text_of(store)


def test_damaged_records_are_listed_and_foreign_files_are_folded() -> None:
    files = (
        UnusedFile(name="runs/cut.json", kind="damaged", reason="not JSON: line 1"),
        UnusedFile(name="runs/copy.json", kind="duplicate", reason="the same as runs/0.json"),
        UnusedFile(name="runs/package.json", kind="foreign", reason="not a run record"),
    )
    store = Store(runs=make_store(make_record()).runs, left_out=files)
    text = text_of(store)
    assert cells(text, "runs/cut.json") == ["damaged", "not JSON: line 1"]
    assert cells(text, "runs/copy.json") == ["duplicate", "the same as runs/0.json"]
    folded = text.split("<summary>1 more file ignored: not finished runs</summary>")[1]
    assert "- runs/package.json: not a run record\n" in folded


# ---------------------------------------------------------------------------------- loss parity


def certified(*records: Record, **changes: Any) -> str:
    certificate = read_certificate(make_certificate(**changes), "runs/parity.json")
    store = replace(make_store(*records), certificates=(certificate,))
    return text_of(store)


def run_with(device: str = "cpu", accumulate: int = 1, **parallel: Any) -> Record:
    config = replace(make_config(), parallel=ParallelConfig(**parallel), accumulate=accumulate)
    return make_record(
        config=to_dict(config),
        world_size=config.parallel.world_size,
        global_batch_size=config.global_batch_size,
        hardware=[HOST | {"device": device}],
    )


def test_loss_parity_has_a_row_for_each_strategy_and_device_count() -> None:
    text = certified(make_record()).split("# Loss parity")[1]
    assert "## GPT on cpu, devices 2" in text
    assert "6 configurations: 3 equal, 1 different, 1 refused, 1 failed over 20 steps" in text
    assert "[certificate](../runs/parity.json)" in text
    assert "```sh\npython -m scaling parity --recipe gpt --devices 2\n```" in text
    heads = ["devices", "32-true: loss, norm", "bf16-mixed: loss, norm", "16-mixed: loss, norm"]
    assert cells(text, "strategy") == [*heads, "equal", "different", "refused", "failed"]
    nothing = ["not tried", "not tried"]
    assert cells(text, "single") == ["1", "0.0e+00, 0.0e+00", *nothing, "1", "0", "0", "0"]
    millionth, thousandth = "9.5e-07, 0.0e+00", "9.8e-04, 0.0e+00"  # 2**-20 and 2**-10
    assert cells(text, "ddp") == ["2", millionth, thousandth, "not tried", "2", "0", "0", "0"]
    (fsdp,) = re.findall(r"^\| fsdp +\|.*", text, flags=re.MULTILINE)
    row = ["2", "0.0e+00, 1.0e+00", "not tried", "refused", "0", "1", "1", "1"]
    assert cells(fsdp, "fsdp") == row


def test_parity_bounds_are_printed_with_their_reasons() -> None:
    text = certified().split("# Loss parity")[1]
    assert cells(text, "32-true")[:2] == ["1e-05", "0.0001"]
    assert all(cells(text, precision)[2] for precision in get_args(Precision))


def test_cases_that_are_not_equal_are_listed_with_their_command() -> None:
    text = certified().split("Not equal:")[1]
    verdict, what = cells(text, "fsdp x 2, 32-true")
    assert verdict == "different"
    assert what.startswith("loss 0.0e+00 at step 1, gradient norm 1.0e+00 at step 20; first loss")
    assert "# fsdp x 2, 32-true\npython -m recipes.gpt --strategy fsdp\n" in text
    assert cells(text, "fsdp x 2, 32-true, compile default")[0] == "failed"


def test_refusals_name_the_strategies_of_each_reason() -> None:
    reason = "strategy {} reads /home/x/y: choose another"
    figures = dict.fromkeys(name for name in RESULTS[4] if name.endswith(("difference", "step")))
    refused = {"verdict": "refused", "loss": [], "gradient_norm": []} | figures
    more = [
        RESULTS[1] | refused | {"strategy": name, "reason": reason.format(name)}
        for name in ("zero1", "zero3", "zero3")
    ]
    text = certified(results=[*RESULTS, *more]).split("Refused:")[1]
    assert "- 1 configuration (fsdp): no loss scaler sees it" in text
    assert "- 3 configurations (zero1, zero3): strategy … reads …/y: choose another" in text


def test_every_speed_names_the_certificate_that_covers_it() -> None:
    linked = "[certificate](runs/parity.json)"
    spread: dict[str, Any] = {"devices": 8, "accelerator": "cpu"}
    for record, cell in (
        (run_with(strategy="single"), "the reference itself"),
        (run_with(strategy="auto"), "the reference itself"),
        (run_with(strategy="ddp", **spread), f"equal on 2 devices, {linked}"),
        (run_with(strategy="ddp", accumulate=4, **spread), f"equal on 2 devices, {linked}"),
        (run_with(strategy="fsdp", **spread), f"**different** on 2 devices, {linked}"),
        (run_with(strategy="fsdp", compile="default", **spread), "**failed** on 2 devices, "),
        (run_with(strategy="ddp", compile="default", **spread), "none"),
        (run_with(strategy="hsdp", **spread), "none"),
        (run_with("H200", strategy="ddp", devices=8), "none"),
        (make_record("bert"), "the reference itself"),
    ):
        (found,) = cells(certified(record), "loss parity")
        assert found.startswith(cell)


def test_the_newest_certificate_is_used() -> None:
    old, new = make_certificate(), make_certificate(started_at="2026-02-02T00:00:00+00:00")
    new["cases"] = [RESULTS[3] | {"strategy": "ddp"}]
    certificates = (read_certificate(new, "a.json"), read_certificate(old, "b.json"))
    for order in (certificates, certificates[::-1]):
        store = replace(make_store(run_with(strategy="ddp", devices=2)), certificates=order)
        text = text_of(store)
        assert cells(text, "loss parity") == ["**different** on 2 devices, [certificate](a.json)"]
        assert text.index("[certificate](../a.json)") < text.index("[certificate](../b.json)")


def test_an_edited_certificate_is_reported_and_proves_nothing() -> None:
    edited = [*RESULTS[:3], RESULTS[3] | {"verdict": "equal"}]
    text = certified(make_record(), results=edited)
    assert "4 configurations: 3 equal, 1 different" in text
    assert "> [!" not in certified(make_record())


def test_other_bounds_of_an_older_certificate_have_a_note() -> None:
    bounds = describe_bounds()
    bounds["bf16-mixed"]["loss"] = 0.5
    text = certified(bounds=bounds)
    assert "> [!NOTE]" in text
    assert "bf16-mixed was held to loss 0.5" in text


def test_a_certificate_alone_gives_a_report(runs: Path) -> None:
    write_certificate(make_certificate(results=RESULTS[:1]), Path("proofs"))
    assert main(["report", "proofs"]) == 0
    assert "Nothing to compare" in Path("RESULTS.md").read_text()
    assert "# Loss parity" in Path("RESULTS-pages/parity.md").read_text()
    edited = make_certificate(results=[RESULTS[3] | {"verdict": "equal"}])
    Path("proofs", "edited.json").write_text(json.dumps(edited))
    assert main(["report", "proofs"]) == 0
    assert main(["lint", "RESULTS.md"]) == 1


# ---------------------------------------------------------------------------------- Markdown


def test_pipes_newlines_and_markup_stay_inside_their_cell() -> None:
    record = make_record()
    record["validation"]["baseline"]["name"] = "word '|' *or* `<unk>`\nnext | line"
    text = render(record, make_crashed(error={"type": "E", "message": "a | b\n\nc"}))
    assert cells(text, "trivial baseline") == [
        r"word '\|' \*or\* \`&lt;unk&gt;\`<br>next \| line, 2.5000 nats"
    ]
    assert r"E: a \| b<br><br>c" in text
    _assert_tables_are_whole(text)


def test_every_table_row_has_as_many_cells_as_its_header() -> None:
    _assert_tables_are_whole(render(*three(), *three(), make_crashed()))


def test_a_fence_is_longer_than_any_in_its_text() -> None:
    assert "````\na\n```\nb\n````" in render(make_record(summary="a\n```\nb"))


def _assert_tables_are_whole(text: str) -> None:
    outside_code = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [block for block in outside_code.split("\n\n") if block.startswith("|")]
    assert len(blocks) >= 3
    for block in blocks:
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


# ---------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("recipe", get_args(Recipe))
def test_the_drawing_has_the_numbers_of_the_config(recipe: Recipe) -> None:
    config = make_config(recipe)
    drawn = draw_architecture(config)
    assert drawn.startswith("flowchart TB\n")
    assert "4 heads x 4" in drawn
    assert "16 → 32 → 16" in drawn
    assert "2 layers" in drawn
    assert f"linear 16 → {config.model.num_classes}" in drawn
    assert ("causal" in drawn) == (recipe == "gpt")


def test_the_drawing_names_the_positions_that_count_for_the_loss() -> None:
    assert '"1 masked of 8 positions"' in draw_architecture(make_config("bert"))
    assert '"all 8 positions"' in draw_architecture(make_config("gpt"))
    assert '"the class token"' in draw_architecture(make_config("vit"))


def test_images_are_drawn_as_patches_and_a_class_token() -> None:
    drawn = draw_architecture(make_config("vit"))
    assert "image, 3 x 8 x 8" in drawn
    assert "4 patches of 4 x 4 pixels<br/>linear 48 → 16" in drawn
    assert "class token in front: 5 positions" in drawn


def test_a_final_norm_and_a_tied_head_are_drawn_if_present() -> None:
    config = make_config("gpt")
    assert "final_norm" not in draw_architecture(config)
    model = replace(config.model, final_norm=True, tied_head=True, head_bias=False, dropout=0.1)
    drawn = draw_architecture(replace(config, model=model))
    assert 'final_norm["LayerNorm 16"] --> head' in drawn
    assert "no bias, tied to the embedding" in drawn
    assert "dropout 0.1" in drawn


@pytest.mark.parametrize("recipe", get_args(Recipe))
def test_no_label_looks_like_a_list_to_mermaid(recipe: Recipe) -> None:
    labels = re.findall('"([^"]*)"', draw_architecture(make_config(recipe)))
    assert len(labels) > 8
    assert not [label for label in labels if re.match(r"[-+*]|\d+[.)] ", label)]


# ---------------------------------------------------------------------------------- command line


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a record of each recipe, in the working folder of the test."""
    monkeypatch.chdir(tmp_path)
    for record in (*three(), make_crashed()):
        name = f"{record['recipe']}-{record['status']}.json"
        write_record(record, tmp_path / "my runs" / name)
    return tmp_path / "my runs"


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    assert main(arguments) == code
    line, end = capsys.readouterr().err.split("\n")
    assert end == ""
    assert line.startswith("error: ")
    return line


def test_the_command_writes_the_report_without_torch(runs: Path, repository: Path) -> None:
    program = (
        "import sys; from scaling.__main__ import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'lightning'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, "report", "my runs"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "plots/bert-loss.svg",
        "plots/gpt-loss.svg",
        "plots/vit-loss.svg",
        "RESULTS-pages/runs.md",
        "RESULTS-pages/conditions.md",
        "RESULTS.md",
        "4 records used (1 crashed, 3 ok); no file left out",
    ]


def test_every_link_of_the_report_leads_to_a_file(runs: Path) -> None:
    assert main(["report", str(runs), "--out", "docs/all.md", "--plots", "docs/some plots"]) == 0
    pages = [Path("docs/all.md"), *Path("docs/all-pages").iterdir()]
    assert {page.name for page in pages} == {"all.md", "conditions.md", "runs.md"}
    for page in pages:
        text = page.read_text()
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert links
        assert all((page.parent / unquote(link)).is_file() for link in links)
        assert str(runs.parent) not in text
    assert "report '../my runs' --out all.md --plots 'some plots'\n" in pages[0].read_text()


def test_the_pages_lie_where_they_were_asked_for(runs: Path) -> None:
    assert main(["report", str(runs), "--pages", "docs/more"]) == 0
    assert Path("docs/more/runs.md").is_file()
    text = Path("RESULTS.md").read_text()
    assert "[runs.md](docs/more/runs.md)" in text
    assert f"\npython -m scaling report '{runs.name}' --pages docs/more\n" in text


def test_the_command_in_the_report_writes_the_same_bytes(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["report", str(runs), "--out", str(runs / "out" / "RESULTS.md")]) == 0
    first = {path.name: path.read_bytes() for path in (runs / "out").rglob("*.*")}
    monkeypatch.chdir(runs / "out")
    assert "\npython -m scaling report ..\n" in Path("RESULTS.md").read_text()
    assert main(["report", ".."]) == 0
    assert {path.name: path.read_bytes() for path in Path().rglob("*.*")} == first
    assert len(first) == 6


def test_the_command_writes_an_html_page_csv_and_json_on_request(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: runs.parent / "out" / f"all.{name}" for name in ("html", "csv", "json")}
    asked = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    assert main(["report", str(runs), *asked]) == 0
    assert {str(path) for path in files.values()} <= set(capsys.readouterr().out.splitlines())
    store = load_store([runs], relative_to=runs.parent)
    assert files["csv"].read_bytes().decode() == to_csv(rows(store))
    assert files["json"].read_text() == to_json(rows(store))
    assert files["html"].read_text() == render_html(StoreAnalysis(store), title="Results")
    text = Path("RESULTS.md").read_text()
    assert f"\npython -m scaling report '{runs.name}'\n" in text, "it writes the text alone"
    actual = error_of(capsys, ["report", str(runs), "--csv", str(runs)])
    assert "csv" in actual


def test_an_edited_record_is_left_out_with_its_field(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "gpt-ok.json"
    path.write_text(path.read_text().replace('"tokens_per_s": 160.0', '"tokens_per_s": 161.0'))
    assert main(["report", str(runs)]) == 0
    reason = "record: tokens_per_s was changed after it was written; measure again"
    assert reason in capsys.readouterr().out
    assert reason in Path("RESULTS-pages/conditions.md").read_text()


def test_a_record_that_contradicts_its_samples_fails_the_command_and_is_named(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(make_record(tokens_per_s=1.0), runs / "gpt-ok.json")
    assert main(["report", str(runs)]) == 0
    assert main(["lint", "RESULTS.md"]) == 1
    assert "my runs/gpt-ok.json: tokens_per_s is 1.0 in the record, 160" in capsys.readouterr().out


def test_damaged_records_do_not_stop_the_command(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "cut.json").write_text("{")
    (runs / "other.json").write_text("{}")
    assert main(["report", str(runs)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("4 records used (1 crashed, 3 ok); 2 files left out (1 damaged, 1 for")
    assert "my runs/cut.json: not JSON" in last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no command given; choose one of: report"),
        (["repot"], "repot"),
        (["report"], "report needs a folder that holds run records"),
        (["report", "nowhere"], "nowhere does not exist; give a folder"),
        (["report", "my runs/gpt-ok.json"], "is a file; give the folder it is in"),
        (["report", "my runs", "--oot", "x"], "--oot is not an option"),
        (["report", "my runs", "--out"], "--out"),
        (["report", "my runs", "--out", "my runs"], "out my runs is a folder"),
        (["report", "my runs", "--out", "my runs/gpt-ok.json/x/y.md"], "gpt-ok.json is a file"),
        (["report", "my runs", "--plots", "my runs/gpt-ok.json"], "plots my runs/gpt-ok.json is a"),
        (["report", "my runs", "--pages", "my runs/gpt-ok.json"], "pages my runs/gpt-ok.json is a"),
        (["report", "empty"], "empty: no run record below; no file left out; give a folder that"),
        (["report", "foreign"], "foreign: no run record below; 2 files left out (1 damaged, 1 for"),
    ],
)
def test_bad_usage_is_one_line_and_writes_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("empty").mkdir()
    Path("foreign").mkdir()
    Path("foreign", "a.json").write_text("[]")
    Path("foreign", "b.json").write_text("{")
    assert words in error_of(capsys, arguments)
    assert not Path("RESULTS.md").exists()
    assert not Path("plots").exists()


def test_a_folder_that_cannot_be_written_is_refused(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, ["report", str(runs), "--out", "/proc/new/RESULTS.md"])
    assert "/proc cannot be written (" in line
    assert "choose another path" in line


def test_a_disk_error_is_a_failure(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scaling.report.command.write_atomically", fail)
    assert "No space left" in error_of(capsys, ["report", str(runs)], code=1)


def test_help_answers_without_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    actual = capsys.readouterr().out
    for option in ("DIR", "--out", "--plots", "--pages", "--config", "--print_config"):
        assert option in actual
