"""Finds options that a mode of a command would leave unused."""

from typing import Any

from unitransformer.cli import Parser


def changed_options(given: Any, parser: Parser) -> dict[str, Any]:
    """Returns the options with another value than the default, by name as they are typed."""
    defaults = parser.get_defaults()
    names = [name for name in vars(defaults) if getattr(given, name, None) != defaults[name]]
    return {name.replace("_", "-"): given[name] for name in names}
