"""Which changes of the code make records stale: what it computes, not how it reads or where."""

import json
import subprocess
from pathlib import Path

import pytest

from scaling.report.code_digest import PEER_ENTRIES, PROOFS, compare_commits

GPT = """
from unitransformer.training import Trainer

print(Trainer(3).train([1.0, 2.0]))
"""
TRAINING = """
\"\"\"Trains.\"\"\"
import math
import torch
from unitransformer.loss import loss_of, scaled

STEPS: int = 8

class Trainer:
    def __init__(self, width: int) -> None:
        self.width = width

    def on_train_end(self) -> None:
        print("done")

    def train(self, values: list[float]) -> float:
        \"\"\"Trains.\"\"\"
        if not values:
            raise ValueError(f"values holds {len(values)} of them; give one")
        total = scaled(values, "mean")
        return self.width * total - STEPS * torch.relu(loss_of(values))
"""
LOSS = """
def loss_of(values):
    return sum(values)

def scaled(values, reduction):
    return max(values) / 2

def unused():
    return 1
"""
FILES = {
    "recipes/gpt.py": GPT,
    "unitransformer/training.py": TRAINING,
    "unitransformer/loss.py": LOSS,
    "unitransformer/export.py": "def export():\n    return 1\n",
}


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder: Path, files: dict[str, str]) -> str:
    for path in folder.rglob("*.py"):
        path.unlink()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "code", "--allow-empty")
    return git(folder, "rev-parse", "HEAD")


def is_same(folder: Path, files: dict[str, str]) -> bool | None:
    """Whether these files compute what `FILES` compute."""
    git(folder.parent, "init", "-q", folder.name)
    before = commit(folder, FILES)
    commit(folder, files)
    compared = compare_commits(folder, [before])
    assert compared is not None
    return compared[before]


def edited(name: str, *changes: tuple[str, str]) -> dict[str, str]:
    text = FILES[f"unitransformer/{name}.py"]
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return FILES | {f"unitransformer/{name}.py": text}


def renamed() -> dict[str, str]:
    """Class, functions, constant, attribute, method, parameter, local variable and module."""
    names = {
        "Trainer": "Teacher",
        "loss_of": "error_of",
        "STEPS": "NUM_STEPS",
        "width": "breadth",
        "train(": "teach(",
        "values": "samples",
        "total": "whole",
        "unitransformer.loss": "unitransformer.training.error",
        "unitransformer.training ": "unitransformer.training.teacher ",
    }
    files = {}
    for path, text in FILES.items():
        for old, new in names.items():
            text = text.replace(old, new)
        files[path] = text
    files["unitransformer/training/teacher.py"] = files.pop("unitransformer/training.py")
    files["unitransformer/training/error.py"] = files.pop("unitransformer/loss.py")
    return files


def moved() -> dict[str, str]:
    """One function in the other module."""
    _, first, rest = LOSS.partition("def loss_of(values):\n    return sum(values)\n")
    return edited(
        "training",
        ("import loss_of, scaled", "import scaled"),
        ("STEPS: int", f"{first}\nSTEPS: int"),
    ) | {"unitransformer/loss.py": rest}


def other_function() -> dict[str, str]:
    return edited(
        "training", ("relu(loss_of(", "relu(unused("), ("import loss_of", "import unused")
    )


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(FILES, id="nothing"),
        pytest.param(edited("training", ("Trains.", "Fits the model.")), id="docstring"),
        pytest.param(edited("training", ("values holds", "there are")), id="message"),
        pytest.param(edited("training", ("STEPS: int = 8", "# Why.\nSTEPS = 8")), id="comment"),
        pytest.param(edited("loss", ("def unused():\n    return 1\n", "")), id="unused code"),
        pytest.param(FILES | {"unitransformer/export.py": "1"}, id="what no recipe reaches"),
        pytest.param(renamed(), id="renames and moved files"),
        pytest.param(moved(), id="moved function"),
        pytest.param(
            edited(
                "training", ("import torch\n", "from torch import relu as f\n"), ("torch.relu", "f")
            ),
            id="another way to import the same",
        ),
    ],
)
def test_moving_renaming_and_rewording_code_is_no_change(
    tmp_path: Path, files: dict[str, str]
) -> None:
    assert is_same(tmp_path / "checkout", files) is True


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(edited("training", ("= 8", "= 9")), id="constant"),
        pytest.param(edited("training", ("total - STEPS", "total + STEPS")), id="operator"),
        pytest.param(edited("training", ("loss_of(values)", "abs(loss_of(values))")), id="call"),
        pytest.param(edited("training", ("torch.relu", "torch.sigmoid")), id="function of torch"),
        pytest.param(edited("training", ('"mean"', '"sum"')), id="string of one word"),
        pytest.param(
            other_function(),
            id="another function of ours",
        ),
        pytest.param(
            edited(
                "training",
                ("import torch\n", "import torch\nfrom torch import sigmoid as relu\n"),
                ("torch.relu", "relu"),
            ),
            id="another function of torch under the same name",
        ),
        pytest.param(
            edited("training", ("import torch\n", "import tensors as torch\n")),
            id="another library under the same name",
        ),
        pytest.param(
            edited("training", ("import loss_of,", "import unused as loss_of,")),
            id="another function of ours under the same name",
        ),
        pytest.param(
            edited("loss", ("def loss_of", "from torch import gelu as silu\n\ndef loss_of")),
            id="an import for other modules",
        ),
        pytest.param(edited("training", ("on_train_end", "on_train_start")), id="hook"),
        pytest.param(edited("loss", ("sum(values)", "max(values)")), id="built-in"),
        pytest.param(edited("loss", ("max(values) / 2", "2 / max(values)")), id="order"),
    ],
)
def test_what_computes_something_else_is_a_change(tmp_path: Path, files: dict[str, str]) -> None:
    assert is_same(tmp_path / "checkout", files) is False


def test_code_of_peers_is_compared_for_comparisons_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    git(tmp_path, "init", "-q", "checkout")
    worker = {
        "unitransformer/peers/worker.py": "def train():\n    import unitransformer.peers.plain\n"
    }
    plain = "unitransformer/peers/plain.py"
    before = commit(folder, FILES | worker | {plain: "WIDTH = 1\n"})
    commit(folder, FILES | worker | {plain: "WIDTH = 2\n"})
    assert compare_commits(folder, [before]) == {before: True}
    assert compare_commits(folder, [before], PEER_ENTRIES) == {before: False}


def test_a_commit_that_is_not_there_is_unknown_and_no_checkout_is_no_answer(tmp_path: Path) -> None:
    assert compare_commits(tmp_path, ["0123456789ab"]) is None
    folder = tmp_path / "checkout"
    git(tmp_path, "init", "-q", "checkout")
    commit(folder, FILES)
    assert compare_commits(folder, ["0123456789ab"]) == {"0123456789ab": None}


def test_a_proof_makes_two_commits_equal_and_goes_on_to_what_follows(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "checkout")
    folder, split = tmp_path / "checkout", edited("loss", ("sum(values)", "sum(list(values))"))
    other = commit(folder, edited("loss", ("sum(values)", "max(values)")))
    before, after = commit(folder, FILES), commit(folder, split)
    reworded = {name: text.replace("give one", "one is needed") for name, text in split.items()}
    commit(folder, reworded)
    assert compare_commits(folder, [before, after]) == {before: False, after: True}
    proof = {"before": before, "after": after, "proof": "losses of 3 recipes equal bit for bit"}
    (folder / "scaling").mkdir()
    (folder / PROOFS).write_text(json.dumps([proof]))
    assert compare_commits(folder, [before, other]) == {before: True, other: False}
    (folder / PROOFS).write_text(json.dumps([{"before": before}]))
    with pytest.raises(ValueError, match=r"equivalent_code\.json\.0: after is missing"):
        compare_commits(folder, [before])
