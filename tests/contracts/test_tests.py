"""Rules for the tests themselves."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


def imported_tests(source: str) -> set[str]:
    """Modules named test_* that `source` imports, also inside of functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    return {name for name in names if is_test(name)}


def is_test(name: str) -> bool:
    return any(part.startswith("test_") for part in name.split("."))


def test_no_test_file_imports_another_test_file() -> None:
    files = sorted(TESTS.rglob("*.py"))
    assert len([file for file in files if file.name.startswith("test_")]) > 80
    imports = {str(file.relative_to(TESTS)): imported_tests(file.read_text()) for file in files}
    assert {file: names for file, names in imports.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from test_store import make_record",
        "from tests.unit.test_store import make_record",
        "from tests.unit import test_store",
        "from . import test_store",
        "import tests.unit.test_store",
        "def build():\n    from .test_store import make_record",
    ],
)
def test_every_form_of_such_an_import_is_detected(source: str) -> None:
    assert imported_tests(source)
    assert imported_tests("from tests.builders.records import make_record\nimport ast") == set()


def test_folders_of_unit_tests_are_folders_of_the_code(repository: Path) -> None:
    unit = repository / "tests" / "unit"
    for file in unit.rglob("test_*.py"):
        folder = file.parent.relative_to(unit)
        is_other = folder.parts[:1] in {("recipes",), ("scaling",), ("slurm",)}
        code = repository / ("" if is_other else "unitransformer") / folder
        assert code.is_dir(), f"{file}: no folder {code}"


def test_marks_by_which_make_test_finds_files_are_set_in_test_files_only() -> None:
    mark = re.compile(r"""mark\.(alone|gpu)\b|add_marker\(["'](alone|gpu)""")
    others = [file for file in TESTS.rglob("*.py") if not file.name.startswith("test_")]
    assert [file for file in others if mark.search(file.read_text())] == []
