"""Tests what `--help` says of options."""

from unitransformer.cli import Parser
from unitransformer.cli_help import HelpFormatter


def test_help_names_the_type_of_a_value_and_none_of_a_switch() -> None:
    parser = Parser(formatter_class=HelpFormatter)
    parser.add_argument("--number", type=float, default=2.0, help="of them")
    parser.add_argument("--switch", action="store_true", help="do it")
    text = parser.format_help()
    assert "of them (type: float, default: 2.0)" in text
    assert "do it (default: False)" in text
