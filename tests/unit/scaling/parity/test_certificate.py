"""Tests the parity certificate: built from runs, written, read, and checked for contradictions."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from recipes import bert, gpt, vit
from recipes.options import build_config, parse
from scaling.__main__ import main
from scaling.parity.cases import Case
from scaling.parity.certificate import find_contradictions, find_other_bounds
from scaling.parity.certificate_file import read_certificate, write_certificate
from scaling.recipe_process import ProcessResult
from scaling.report.results_md import render_pages
from scaling.report.store_analysis import StoreAnalysis
from scaling.store.reader import Store, load_store
from tests.builders.certificates import PLAIN, RESULTS, STEPS, make_certificate, make_result
from tests.builders.records import broken_variants, make_record
from tests.builders.reports import OPTIONS
from unitransformer.config import Recipe, RunConfig, to_dict
from unitransformer.record.schema import write_record

# ---------------------------------------------------------------------------------- files


def test_a_certificate_written_beside_records_is_loaded(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path / "run.json")
    content = make_certificate()
    path = write_certificate(content, tmp_path)
    assert path.name == f"parity-gpt-{content['config_hash']}-1.json"
    store = load_store([tmp_path], relative_to=tmp_path)
    assert ([run.name for run in store.runs], store.left_out) == (["run.json"], ())
    (certificate,) = store.certificates
    assert certificate.name == path.name
    assert certificate.content == content
    verdicts = [certificate.verdict(result) for result in certificate.results]
    assert verdicts == ["equal", "equal", "equal", "different", "refused", "failed"]


def pages_on_parity(store: Store) -> list[str]:
    pages = render_pages(StoreAnalysis(store), OPTIONS)
    return [text for text in pages.values() if text.startswith("# Loss parity\n")]


def test_a_case_shows_its_nodes_and_an_older_certificate_had_one() -> None:
    case = make_result(Case(strategy="hsdp", devices=4, num_nodes=2), PLAIN)
    older = {name: case[name] for name in case if name not in ("num_nodes", "work")}
    for results, spread in (([case], "4 (2 nodes x 2)"), ([older], "4")):
        certificate = read_certificate(make_certificate(results=results), "a.json")
        assert certificate.verdict(certificate.results[0]) == "equal"
        store = Store(runs=(), left_out=(), certificates=(certificate,))
        (report,) = pages_on_parity(store)
        (row,) = (line for line in report.splitlines() if line.startswith("| hsdp "))
        assert [cell.strip() for cell in row.split("|")][2:4] == [spread, "0.0e+00, 0.0e+00"]


def test_a_second_certificate_of_a_model_gets_another_number(tmp_path: Path) -> None:
    names = [write_certificate(make_certificate(), tmp_path).name for _ in range(2)]
    assert [name[-7:] for name in names] == ["-1.json", "-2.json"]
    store = load_store([tmp_path], relative_to=tmp_path)
    assert [certificate.name for certificate in store.certificates] == names[:1]
    assert [(file.kind, file.name) for file in store.left_out] == [("duplicate", names[1])]


def test_an_invalid_certificate_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="certificate: cases is empty"):
        write_certificate(make_certificate(results=[]), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- doubt


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda content: content["cases"][3].update(verdict="equal"),
            "verdict of fsdp x 2, 32-true is equal in the certificate, different by its samples",
        ),
        (
            lambda content: content["cases"][3].update(gradient_norm_difference=1e-6),
            "gradient_norm_difference of fsdp x 2, 32-true is 1e-06 in the certificate, 1.0 by",
        ),
        (
            lambda content: content["cases"][0].update(loss=[2.0] * 19 + [2.5]),
            "loss_difference of single x 1, 32-true is 0.0 in the certificate, 0.25 by",
        ),
        (
            lambda content: content["reference"].update(loss=[2.5] + [2.0] * 19),
            "first_loss_difference of single x 1, 32-true is 0.0 in the certificate, 0.2 by",
        ),
        (
            lambda content: content["bounds"]["32-true"].update(gradient_norm=2.0),
            "verdict of fsdp x 2, 32-true is different in the certificate, equal by its samples",
        ),
        (
            lambda content: content["cases"][4].update(loss_difference=0.0),
            "loss_difference of fsdp x 2, 16-mixed is 0.0 in the certificate, nothing by",
        ),
    ],
    ids=["verdict", "difference", "samples", "reference", "bounds", "a figure of no run"],
)
def test_an_edited_certificate_contradicts_itself(
    change: Callable[[dict[str, Any]], None], said: str
) -> None:
    content = make_certificate()
    assert find_contradictions(read_certificate(content, "a.json")) == []
    change(content)
    found = find_contradictions(read_certificate(content, "a.json"))
    assert any(line.startswith(said) for line in found), found


def test_a_verdict_follows_from_the_current_bounds() -> None:
    content = make_certificate()
    content["bounds"]["32-true"]["gradient_norm"] = 2.0
    content["bounds"]["16-mixed"]["gradient_norm"] = 2.0  # no case used it
    content["cases"][3]["verdict"] = "equal"
    certificate = read_certificate(content, "a.json")
    assert find_contradictions(certificate) == []
    assert find_other_bounds(certificate) == [
        "32-true was held to loss 1e-05 and gradient norm 2, now to loss 1e-05 and gradient norm "
        "0.0001"
    ]
    assert certificate.verdict(certificate.results[3]) == "different"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"accelerator": "cuda"}, "accelerator is 'cuda'; its config says 'cpu'"),
        ({"steps": 21}, "steps is 21; its config says 20"),
        ({"seed": 1}, "seed is 1; its config says 0"),
        ({"config_hash": "0" * 12}, "config_hash is"),
        ({"bounds": {}}, "no bounds for precision 32-true"),
        ({"hardware": []}, "hardware is empty"),
        ({"cases": [RESULTS[0] | {"loss": [2.0]}]}, "1 losses and 20 norms of 20 steps"),
        ({"cases": [RESULTS[0] | {"loss": [0.0] * 20}]}, "not above 0"),
        ({"cases": [RESULTS[0] | {"loss": [float("nan")] * 20}]}, "loss is not a list of int or"),
        ({"cases": [RESULTS[0] | {"verdict": "refused"}]}, "verdict is refused with samples"),
        ({"cases": [RESULTS[4] | {"verdict": "equal"}]}, "verdict is equal with no samples"),
        ({"cases": [RESULTS[4] | {"verdict": "fine"}]}, "verdict is 'fine'"),
        ({"cases": [RESULTS[0] | {"strategy": "dpp"}]}, "strategy is 'dpp'"),
        ({"cases": [RESULTS[1] | {"num_nodes": 3}]}, "the first a multiple of the second"),
        (
            {"cases": [RESULTS[0] | {"devices": 0}]},
            "devices, num_nodes and accumulate must be at least 1",
        ),
    ],
)
def test_a_damaged_certificate_is_left_out_with_its_reason(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(make_certificate(**changes)))
    store = load_store([tmp_path], relative_to=tmp_path)
    assert store.certificates == ()
    (file,) = store.left_out
    assert file.kind == "damaged"
    assert reason in file.reason


def test_a_certificate_with_any_broken_value_is_rejected_or_reported(tmp_path: Path) -> None:
    for index, broken in enumerate(broken_variants(make_certificate())):
        (tmp_path / f"{index}.json").write_text(json.dumps(broken))
    store = load_store([tmp_path], relative_to=tmp_path)
    assert len(store.left_out) > 200
    assert len(store.certificates) > 50
    for certificate in store.certificates:
        alone = Store(runs=(), left_out=(), certificates=(certificate,))
        assert len(pages_on_parity(alone)) == 1


# ---------------------------------------------------------------------------------- studies


def ledger(graphs: int | None = None, **found: list[dict[str, Any]]) -> dict[str, Any]:
    return {"graphs": graphs, "graph_breaks": [], "recompiles": [], **found}


def recomputed(config: RunConfig) -> int:
    is_off = config.parallel.activation_checkpointing == "off"
    return 0 if is_off else config.model.num_layers


PRESETS = {"bert": bert.PRESET, "gpt": gpt.PRESET, "vit": vit.PRESET}
Behave = Callable[[RunConfig, Path], int | None]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs `scaling parity` with fake runs, which write a record or do what `behave` does."""

    def certify(behave: Behave, *options: str, code: int = 0) -> dict[str, Any]:
        def run(
            recipe: Recipe,
            arguments: Sequence[str],
            *,
            log: Path,
            limit_s: float,
        ) -> ProcessResult:
            request = parse(PRESETS[recipe], arguments)
            config = build_config(request, defaults=PRESETS[recipe].cpu, devices=1)
            assert request.options.record is not None
            is_first = not list(tmp_path.glob("began"))
            (tmp_path / "began").touch()
            log.write_text("")
            if not is_first:
                exit_code = behave(config, log)
                if exit_code != 0:
                    return ProcessResult(exit_code=exit_code, elapsed_s=0.5)
            record = make_record(
                step_s=[0.1] * STEPS,
                recipe=config.recipe,
                size=config.size,
                config=to_dict(config),
                world_size=config.parallel.world_size,
                global_batch_size=config.global_batch_size,
                loss=list(PLAIN.loss),
                gradient_norm=list(PLAIN.gradient_norm),
                compile=[ledger(graphs=1) if config.parallel.compile != "off" else ledger()],
                recomputed_layers=[recomputed(config)],
            )
            if (log.parent / "changes").exists():
                record |= json.loads((log.parent / "changes").read_text())
            write_record(record, request.options.record)
            return ProcessResult(exit_code=0, elapsed_s=0.5)

        @contextlib.contextmanager
        def start_worker(log: Path) -> Iterator[Any]:
            yield run

        monkeypatch.setattr("scaling.parity.command.start_worker", start_worker)
        out = tmp_path / "out"
        words = ["--recipe", "gpt", "--accelerator", "cpu", "--steps", "20", "--out", str(out)]
        assert main(["parity", "--quick", *words, *options]) == code
        (path,) = out.iterdir()
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    return certify


ONE = ("--strategies", "ddp", "--precisions", "32-true", "--compile", "off")
ALONE = (*ONE, "--activation-checkpointing", "off")


def test_equal_runs_are_certified(study: Callable[..., dict[str, Any]]) -> None:
    content = study(lambda config, log: 0, "--devices", "2,4", *ONE, "--", "--seed", "3")
    assert [case["verdict"] for case in content["cases"]] == ["equal"] * 8
    assert (content["device_counts"], content["seed"], content["steps"]) == ([2, 4], 3, 20)
    assert content["command"].endswith("--devices 2,4 " + " ".join(ONE) + " -- --seed 3")
    assert "--out" not in content["command"]
    command = content["cases"][0]["command"]
    assert "--strategy ddp --devices 2" in command
    assert "--record" not in command


def test_a_refused_case_has_a_row_with_its_reason(study: Callable[..., dict[str, Any]]) -> None:
    def refuse(config: RunConfig, log: Path) -> int:
        if config.parallel.precision == "32-true":
            return 0
        log.write_text("a warning\nerror: precision bf16-mixed: Tesla T4 has none\n")
        return 2

    options = ("--strategies", "ddp,fsdp", "--precisions", "32-true,16-mixed")
    content = study(refuse, *options, "--compile", "off", "--activation-checkpointing", "off")
    actual = {(case["strategy"], case["verdict"]): case["reason"] for case in content["cases"]}
    assert actual["ddp", "refused"] == "precision bf16-mixed: Tesla T4 has none"
    assert "which does not scale the loss" in actual["fsdp", "refused"]
    assert {verdict for _, verdict in actual} == {"equal", "refused"}


@pytest.mark.parametrize(
    ("exit_code", "said", "reason"),
    [
        (None, "", "timeout: more than 600 s"),
        (1, "Traceback\nerror: rank 1 of 2: no (record: /tmp/x.json)\n", "rank 1 of 2: no"),
        (-9, "", "exit code -9: no output"),
        (3, "one\ntwo\n", "exit code 3: two"),
    ],
)
def test_a_run_that_exits_with_an_error_has_failed(
    study: Callable[..., dict[str, Any]], exit_code: int | None, said: str, reason: str
) -> None:
    def fail(config: RunConfig, log: Path) -> int | None:
        log.write_text(said)
        return exit_code

    content = study(fail, *ALONE, code=1)
    assert {(case["verdict"], case["reason"]) for case in content["cases"]} == {("failed", reason)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"description": "another text", "sha256": "cd" * 32}}, "the data are not the"),
        ({"gradient_norm": []}, "20 losses and 0 norms of 20 steps"),
        ({"loss": [2.0] * 19 + [0.0]}, "a loss or gradient norm is not above 0"),
    ],
)
def test_a_run_that_did_something_else_has_failed(
    study: Callable[..., dict[str, Any]], changes: dict[str, Any], reason: str
) -> None:
    def change(config: RunConfig, log: Path) -> int:
        (log.parent / "changes").write_text(json.dumps(changes))
        return 0

    content = study(change, *ALONE, code=1)
    assert {case["verdict"] for case in content["cases"]} == {"failed"}
    assert reason in content["cases"][0]["reason"]


def test_a_difference_fails_the_command(
    study: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def change(config: RunConfig, log: Path) -> int:
        if config.accumulate == 2:
            (log.parent / "changes").write_text(json.dumps({"gradient_norm": [0.5] * STEPS}))
        return 0

    content = study(change, *ALONE, code=1)
    assert [case["verdict"] for case in content["cases"]] == ["equal", "different"]
    assert capsys.readouterr().err.endswith("-1.json: 1 different, 1 equal\n")


def test_a_strategy_without_an_equal_case_fails_the_command(
    study: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(config: RunConfig, log: Path) -> int:
        log.write_text("error: strategy needs DeepSpeed, which is not installed\n")
        return 2 if config.parallel.uses_deepspeed else 0

    strategies = ("--strategies", "ddp,zero1,zero2", *ALONE[2:])
    content = study(refuse, *strategies, code=1)
    assert [case["verdict"] for case in content["cases"]] == ["equal"] * 2 + ["refused"] * 4
    said = capsys.readouterr().err
    assert said.endswith("4 refused; not one case of zero1, zero2 is equal\n")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compile": [ledger(graphs=0)]}, "compile default made no graph"),
        ({"compile": [ledger(graphs=1), ledger(graphs=0)]}, "compile default made no graph"),
        ({"compile": [ledger()]}, "compile default made no graph"),
        (
            {"compile": [ledger(graphs=2, graph_breaks=[{"step": 0}])]},
            "compile default broke graphs 1 times",
        ),
        (
            {"compile": [ledger(graphs=4, recompiles=[{"step": n} for n in (None, 0, 3, 4)])]},
            "compile default compiled again 2 times after the first step",
        ),
        ({"recomputed_layers": [0, 1]}, "checkpointing off computed 0, 1 of 2 layers again"),
    ],
)
def test_equal_losses_prove_nothing_if_the_compiler_did_not_run(
    study: Callable[..., dict[str, Any]], changes: dict[str, Any], reason: str
) -> None:
    def change(config: RunConfig, log: Path) -> int:
        (log.parent / "changes").write_text(json.dumps(changes))
        return 0

    compiled = ("--strategies", "ddp", "--precisions", "32-true", "--compile", "default")
    content = study(change, *compiled, "--activation-checkpointing", "off", code=1)
    case = content["cases"][0]
    assert (case["verdict"], case["reason"]) == ("different", reason)
    assert case["loss_difference"] == 0.0
    certificate = read_certificate(content, "a.json")
    assert certificate.verdict(certificate.results[0]) == "different"
    assert find_contradictions(certificate) == []
    alone = Store(runs=(), left_out=(), certificates=(certificate,))
    assert f"| {reason}; loss 0.0e+00" in pages_on_parity(alone)[0]
    case |= {"verdict": "equal", "reason": None}
    assert len(find_contradictions(read_certificate(content, "a.json"))) == 2


@pytest.mark.parametrize("number", [0, None])
def test_equal_losses_prove_nothing_if_checkpointing_recomputed_nothing(
    study: Callable[..., dict[str, Any]], number: int | None
) -> None:
    def change(config: RunConfig, log: Path) -> int:
        (log.parent / "changes").write_text(json.dumps({"recomputed_layers": [number]}))
        return 0

    content = study(change, *ONE, "--activation-checkpointing", "full", code=1)
    reason = f"checkpointing full computed {number} of 2 layers again"
    assert {(c["verdict"], c["reason"]) for c in content["cases"]} == {("different", reason)}
