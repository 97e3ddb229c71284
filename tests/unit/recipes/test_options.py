"""Tests that a printed config describes the run of its command line, whatever the values."""

import contextlib
import io
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from recipes import bert, gpt, vit
from recipes.options import (
    ParsedCommand,
    RecipeOptions,
    build_config,
    build_parser,
    check_paths,
    parse,
)
from recipes.presets import Preset
from unitransformer.config import ModelConfig, OptimizerConfig, RunConfig

PRESETS = {"bert": bert.PRESET, "gpt": gpt.PRESET, "vit": vit.PRESET}
# YAML reads each of them as something else than text.
NAMES = ["off", "null", "~", "yes", "62117e96", "0012", "1_000", "0x10", "2024-01-01", ".inf", ""]
OPTIONS = {
    f"{prefix}{item.name.replace('_', '-')}": typing.get_type_hints(kind)[item.name]
    for prefix, kind in (
        ("", RecipeOptions),
        ("model.", ModelConfig),
        ("optimizer.", OptimizerConfig),
    )
    for item in fields(kind)
}


def typed(kind: Any) -> st.SearchStrategy[str]:
    """Values of a type as they are typed on a command line."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from([str(part) for part in parts])
    if origin in (typing.Union, types.UnionType):
        return st.one_of([typed(part) for part in parts if part is not types.NoneType])
    if kind is bool:
        return st.sampled_from(["true", "false", "yes", "no", "on", "off"])
    if kind is int:
        numbers = st.integers(min_value=0, max_value=10**6)
        return numbers.map(str) | numbers.map("{:_}".format) | st.sampled_from(["1e3", "0x10"])
    if kind is float:  # a run in this process may have turned off subnormal numbers
        return st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False).map(repr)
    assert kind in (str, Path), kind
    return st.sampled_from(NAMES) | st.text(min_size=1).filter(lambda name: "~" not in name)


def print_config(preset: Preset, arguments: Sequence[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        build_parser(preset).parse_args([*arguments, "--print_config"])
    return printed.getvalue()


def run_config(command: ParsedCommand) -> RunConfig | str:
    """Returns the config, or the error of a command that describes none."""
    try:
        return build_config(command, defaults=command.preset.cpu, devices=1)
    except ValueError as error:
        return str(error)


def check_round_trip(
    preset: Preset, arguments: Sequence[str], expected: ParsedCommand, file: Path
) -> None:
    file.write_text(print_config(preset, arguments), encoding="ascii")
    actual = parse(preset, ["--config", str(file)])
    assert actual == expected
    assert run_config(actual) == run_config(expected)


@given(preset=st.sampled_from([*PRESETS.values()]), data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_printed_config_is_the_run_of_its_command_line(
    preset: Preset, data: st.DataObject, tmp_path: Path
) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), min_size=1, unique=True))
    arguments = [f"--{name}={data.draw(typed(OPTIONS[name]), label=name)}" for name in names]
    try:
        expected = parse(preset, arguments)
    except ValueError:  # such as two options that exclude each other
        assume(False)
    check_round_trip(preset, arguments, expected, tmp_path / "config.yaml")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_name_that_yaml_would_not_read_as_text_is_kept(preset: Preset, tmp_path: Path) -> None:
    for name in filter(None, NAMES):
        paths = [f"--{option}={name}" for option in ("out", "record", "trace", "init-from")]
        arguments = [f"--data={name}", f"--checkpoint-dir={name}", *paths]
        expected = parse(preset, arguments)
        check_round_trip(preset, arguments, expected, tmp_path / "config.yaml")
        assert expected.options.data == os.path.expanduser(name)


def test_a_file_and_a_command_line_read_numbers_alike(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text in ("1e3", "1_000", "1000", "1000.0"):
        file.write_text(f"max-steps: {text}\nmodel:\n  num_layers: {text}\n")
        written = parse(gpt.PRESET, ["--config", str(file)])
        typed_in = parse(gpt.PRESET, ["--max-steps", text, "--model.num-layers", text])
        assert written == typed_in
        assert (written.options.max_steps, written.model["num_layers"]) == (1000, 1000)


@pytest.mark.parametrize(
    "option", ["out", "record", "trace", "checkpoint-dir", "init-from", "data"]
)
def test_a_path_may_begin_with_a_home(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    options = parse(gpt.PRESET, [f"--{option}=~/a"]).options
    assert str(getattr(options, option.replace("-", "_"))) == "/somewhere/a"


@pytest.mark.parametrize("option", ["out", "record", "trace", "checkpoint-dir", "init-from"])
def test_a_home_of_nobody_is_refused(option: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{option} ~nobody-here/a does not exist; check the path"
    ):
        parse(gpt.PRESET, [f"--{option}=~nobody-here/a"])


def test_an_output_folder_whose_name_is_not_utf_8_is_refused() -> None:
    options = parse(gpt.PRESET, ["--out=runs-\udce9"]).options
    with pytest.raises(ValueError, match="is not UTF-8, which TensorBoard needs; choose another"):
        check_paths(options)
