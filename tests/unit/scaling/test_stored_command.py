"""Tests what records keep of a command that was typed."""

import pytest

from scaling.comparison.options import build_compare_parser, read_compare_options
from scaling.stored_command import stored_command


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        (["peers", "--out", "a folder", "--seed", "1"], "peers --seed 1"),
        (["peers", "--out=folder", "--outer"], "peers --outer"),
        (["parity", "--", "gpt", "--out", "x"], "parity -- gpt --out x"),  # of the recipe
        (
            ["compare", "--index-url=https://me:se@cret@host:8080/simple"],
            "compare --index-url=https://host:8080/simple",
        ),
        (["--find-links", "http://token@host/a@b"], "--find-links http://host/a@b"),
        (["compare", "HEAD", "https://host/a@b"], "compare HEAD https://host/a@b"),
    ],
)
def test_a_command_is_stored_without_its_folder_and_without_passwords(
    typed: list[str], stored: str
) -> None:
    assert stored_command(typed) == f"python -m scaling {stored}"


def test_the_record_of_a_comparison_gets_no_password() -> None:
    typed = ["--package", "a==1,2", "--index-url", "https://me:secret@host/simple"]
    options = read_compare_options(build_compare_parser().parse_args(typed), [], typed)
    assert "secret" not in options.command
    assert options.pip_options == ("--index-url=https://me:secret@host/simple",)
