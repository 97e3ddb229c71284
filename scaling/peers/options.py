"""Parses and checks the options of `python -m scaling peers`."""

import importlib.util
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from scaling.peers.pairing import Limits
from scaling.stored_command import stored_command
from unitransformer.cli import Parser, suggest
from unitransformer.config import Accelerator, Compile, Precision, Recipe
from unitransformer.files import check_writable
from unitransformer.peers.catalog import PEER_NAMES, PEERS, Peer, peers_of

DEFAULT_OUT = Path("runs/peers")
DEFAULT_PAIRS = 20
INSTALL = "pip install 'unitransformer[peers]'"
# Options of the recipe that the comparison decides, since peers must have the same.
DECIDED_OPTIONS = frozenset(
    shlex.split(
        "--size --data --data-encoding --data-field --accelerator --devices --num-nodes --strategy "
        "--cpu-offload --precision --batch-size --accumulate --dropout --model.dropout --seed "
        "--init-from --max-steps --until-interval --repeats --out --record --checkpoint-dir "
        "--checkpoint-every --resume --summary --dry-run --rehearse --json --config --print_config "
        "--help -h"
    )
)


@dataclass(frozen=True, kw_only=True)
class PeersOptions:
    """The checked options of `python -m scaling peers`."""

    recipe: Recipe
    size: str
    peers: tuple[Peer, ...]
    compile: tuple[Compile, ...]  # of the peers
    batch_sizes: tuple[int | None, ...]  # None: the recipe's on this machine
    precisions: tuple[Precision | None, ...]
    accelerator: Accelerator
    limits: Limits
    seed: int
    out: Path
    is_dry_run: bool
    recipe_options: tuple[str, ...]  # those after `--`
    command: str  # as typed


def build_peers_parser() -> Parser:
    parser = Parser(
        usage="python -m scaling peers [options] [-- options of the recipe]",
        description="Train other implementations of a recipe's network beside this one: the same "
        "shape, batches, optimizer and threads, no dropout. A process each, blocks of steps in "
        "random order. Prints our speed over the best variant of each peer with a 95 % interval, "
        "and our memory over its memory. Options after -- go to the recipe, such as --compile "
        "default for this side.",
    )

    def add(flag: str, kind: Any, default: Any, help_text: str) -> None:
        parser.add_argument(flag, type=kind, default=default, help=help_text)

    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    add("--recipe", Recipe, "gpt", "network to compare")
    add("--size", str, "reference", "named model size")
    add("--peers", str, "all", f"comma-separated: {', '.join(PEER_NAMES)}")
    add("--compile", str, "off,default", "modes of torch.compile to try on each peer")
    add("--batch-size", str, "auto", "comma-separated; auto: that of the recipe on this machine")
    add("--precision", str, "auto", "comma-separated; auto: that of the recipe on this machine")
    add("--accelerator", Accelerator, "auto", "auto uses a GPU if there is one")
    add("--pairs", int, DEFAULT_PAIRS, "blocks of steps of each network; 6 give an interval")
    add("--seconds", float | None, None, "end each comparison after this time, start included")
    add("--seed", int, 0, "of weights and data")
    add("--out", Path, DEFAULT_OUT, "folder for records; launches in it are pooled")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and exit")
    return parser


def read_peers_options(
    given: Any, recipe_options: Sequence[str], arguments: Sequence[str]
) -> PeersOptions:
    """Checks the options; raises ValueError naming option, value and fix.

    `recipe_options` stand after `--`; `arguments` are the whole command line.
    """
    if given.pairs < 1:
        raise ValueError(f"pairs is {given.pairs}; it must be at least 1")
    if given.seconds is not None and not 0 < given.seconds < float("inf"):
        raise ValueError(f"seconds is {given.seconds:g}; it must be above 0")
    if not 0 <= given.seed < 2**32:
        raise ValueError(f"seed is {given.seed}; it must be at least 0 and below 2**32")
    for name in (option.partition("=")[0] for option in recipe_options):
        if name.replace("_", "-") in DECIDED_OPTIONS:
            raise ValueError(f"{name} after -- is decided by the comparison; leave it out")
    check_writable("out", given.out, is_folder=True)
    return PeersOptions(
        recipe=given.recipe,
        size=given.size,
        peers=_peers(given.recipe, given.peers),
        compile=_chosen("compile", given.compile, get_args(Compile)),
        batch_sizes=_batch_sizes(given.batch_size),
        precisions=_precisions(given.precision),
        accelerator=given.accelerator,
        limits=Limits(rounds=given.pairs, seconds=given.seconds),
        seed=given.seed,
        out=given.out,
        is_dry_run=given.dry_run,
        recipe_options=tuple(recipe_options),
        command=stored_command(arguments),
    )


def _peers(recipe: Recipe, text: str) -> tuple[Peer, ...]:
    fitting = {peer.name: peer for peer in peers_of(recipe)}
    names = tuple(fitting) if text.strip() == "all" else _split(text)
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peers holds {name!r}; {suggest(name, PEER_NAMES)}")
        if name not in fitting:
            raise ValueError(
                f"peers holds {name}, which does not train {recipe}; known: {', '.join(fitting)}"
            )
    peers = tuple(fitting[name] for name in fitting if name in names)
    needed = dict.fromkeys(peer.package for peer in peers if peer.package is not None)
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        others = ",".join(peer.name for peer in fitting.values() if peer.package not in missing)
        raise ValueError(
            f"peers needs {' and '.join(missing)}, not installed: {INSTALL}, or use --peers "
            f"{others}"
        )
    return peers


def _chosen(option: str, text: str, known: Sequence[Any]) -> tuple[Any, ...]:
    names = _split(text)
    for name in names:
        if name not in known:
            raise ValueError(f"{option} holds {name!r}; known: {', '.join(known)}")
    return names


def _batch_sizes(text: str) -> tuple[int | None, ...]:
    if text.strip() == "auto":
        return (None,)
    names = _split(text)
    for name in names:
        if not (name.isdecimal() and int(name) > 0):
            raise ValueError(f"batch-size holds {name!r}; give numbers of at least 1, as 8,32")
    return tuple(map(int, names))


def _precisions(text: str) -> tuple[Precision | None, ...]:
    if text.strip() == "auto":
        return (None,)
    names = _chosen("precision", text, get_args(Precision))
    if "16-mixed" in names:
        raise ValueError(
            "precision holds 16-mixed, whose loss scale skips steps; choose bf16-mixed or 32-true"
        )
    return names


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))
