"""The record of one comparison: this suite and one peer, trained in turn, with raw block times.

Ratios are stored for other tools, and derived again from the samples whenever a record is read. An
edit therefore shows as a contradiction.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from scaling.numbered_file import write_numbered
from scaling.peers.ratios import Ratio, paired_ratio
from unitransformer.config import Compile, RunConfig, from_dict, hash_values
from unitransformer.peers.catalog import PEERS, Peer
from unitransformer.record.fields import NUMBER, Kinds, agree, check_fields, check_lists, is_of_kind

SCHEMA = 1
KIND = "peers"
SIDES = ("ours", "peer")

REQUIRED_FIELDS: dict[str, Kinds] = {
    "config": dict,
    "config_hash": str,
    "peer": str,
    "form": str,
    "compile": str,
    "failure": (str, NoneType),
    "machine.fingerprint": str,
    "machine.cpu": (str, NoneType),
    "versions": dict,
    "code.commit": (str, NoneType),
    "code.is_dirty": (bool, NoneType),
    "command": str,
    "started_at": str,
    "elapsed_s": NUMBER,
}
SIDE_FIELDS: dict[str, Kinds] = {"base_bytes": int, "peak_bytes": int, "num_parameters": int}
SIDE_LISTS: dict[str, Kinds] = {
    "wall_s": NUMBER,
    "processor_s": NUMBER,
    "first_losses": NUMBER,
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """What was measured of one network; seconds are those of one block of steps each."""

    base_bytes: int  # before the network was built: Python and its imports
    peak_bytes: int  # of the measured blocks, imports included; on a GPU of tensors alone
    num_parameters: int
    wall_s: Sequence[float]
    processor_s: Sequence[float]
    first_losses: Sequence[float]

    @property
    def training_bytes(self) -> int:
        """Peak memory beyond that of the imports."""
        return max(1, self.peak_bytes - self.base_bytes)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A record whose fields were checked. Without sides, `failure` says why there are none."""

    name: str  # of its file
    content: Mapping[str, Any]
    config: RunConfig  # of this suite; the peer has its shape, batches and optimizer
    peer: Peer
    form: str
    compile: Compile  # of the peer
    failure: str | None
    ours: Side | None
    other: Side | None

    @property
    def variant(self) -> str:
        """What distinguishes it from the other variants of its peer."""
        compiled = "not compiled" if self.compile == "off" else f"compiled ({self.compile})"
        return f"{self.form}, {compiled}" if self.form else compiled


def derive(ours: Side, other: Side) -> dict[str, Any]:
    """Returns the ratios that the samples imply, as a record stores them."""
    return {
        "speed": asdict(speed(ours, other)),
        "processor_speed": asdict(processor_speed(ours, other)),
        "training_memory": ours.training_bytes / other.training_bytes,
        "process_memory": ours.peak_bytes / other.peak_bytes,
    }


def speed(ours: Side, other: Side) -> Ratio:
    """Returns our speed over the peer's."""
    return paired_ratio(other.wall_s, ours.wall_s)


def processor_speed(ours: Side, other: Side) -> Ratio:
    """Returns the peer's seconds of the processor over ours."""
    # A GPU may be busy while the processor's clock does not advance.
    least = 1e-9
    return paired_ratio(
        [max(least, s) for s in other.processor_s], [max(least, s) for s in ours.processor_s]
    )


def describe_comparison(fields: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a record.

    Args:
        fields: config, peer, form, compile, command, machine, start and seconds.
        measured: what `pairing.measure_pair` returned.
    """
    content = {
        "schema": SCHEMA,
        "kind": KIND,
        **fields,
        "config_hash": hash_values(fields["config"]),
        **measured,
    }
    if (sides := measured.get("sides")) is not None:
        content["derived"] = derive(*(_side(sides[side], f"sides.{side}") for side in SIDES))
    return content


def write_comparison(content: Mapping[str, Any], folder: Path) -> Path:
    """Writes a record under its network, its peer and a new number.

    Raises ValueError for content that is not valid, and OSError.
    """
    comparison = read_comparison(content, "comparison")
    config = comparison.config
    stem = f"{KIND}-{config.recipe}-{config.size}-b{config.batch_size}-{comparison.peer.name}"
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    return write_numbered(text.encode(), folder, stem)


def is_comparison(content: Any) -> bool:
    """Whether JSON claims to be the record of a comparison, valid or not."""
    return isinstance(content, Mapping) and content.get("kind") == KIND


def read_comparison(content: Mapping[str, Any], name: str) -> Comparison:
    """Raises ValueError for a field that is missing, has another type or contradicts another."""
    if not is_comparison(content) or content.get("schema") != SCHEMA:
        raise ValueError(
            f"comparison: schema is {content.get('schema')!r}; this version reads {SCHEMA}"
        )
    check_fields(content, REQUIRED_FIELDS, "comparison")
    config = from_dict(RunConfig, content["config"], "comparison: config")
    if content["config_hash"] != hash_values(content["config"]):
        raise ValueError(
            f"comparison: config_hash is {content['config_hash']!r}; its config says "
            f"{hash_values(content['config'])!r}"
        )
    peer = PEERS.get(content["peer"])
    if peer is None or config.recipe not in peer.recipes:
        raise ValueError(f"comparison: peer {content['peer']!r} is none of recipe {config.recipe}")
    if content["form"] not in peer.forms_for(config.recipe):
        raise ValueError(f"comparison: form is {content['form']!r}, which peer {peer.name} lacks")
    if content["compile"] not in get_args(Compile):
        raise ValueError(f"comparison: compile is {content['compile']!r}")
    for package, version in content["versions"].items():
        if not isinstance(version, str):
            raise ValueError(f"comparison: versions.{package} is {version!r}; it must be str")
    sides = _sides(content)
    if (sides is None) != (content["failure"] is not None):
        raise ValueError("comparison: it holds samples and a failure, or neither")
    return Comparison(
        name=name,
        content=content,
        config=config,
        peer=peer,
        form=content["form"],
        compile=content["compile"],
        failure=content["failure"],
        ours=None if sides is None else sides[0],
        other=None if sides is None else sides[1],
    )


def _sides(content: Mapping[str, Any]) -> tuple[Side, Side] | None:
    stored = content.get("sides")
    if stored is None:
        return None
    where = "comparison: sides"
    if not isinstance(stored, Mapping) or not all(isinstance(stored.get(s), dict) for s in SIDES):
        raise ValueError(f"{where} is not a group of ours and peer")
    check_fields(content, {"steps_per_block": int}, "comparison")
    if content["steps_per_block"] < 1:
        raise ValueError(
            f"comparison: steps_per_block is {content['steps_per_block']}; it must be at least 1"
        )
    ours, other = (_side(stored[side], f"{where}.{side}") for side in SIDES)
    first = content.get("first")
    if not isinstance(first, list) or not all(side in SIDES for side in first):
        raise ValueError("comparison: first does not say which network was first in each round")
    lengths = {len(first), len(ours.wall_s), len(other.wall_s)}
    if len(lengths) != 1 or not first:
        raise ValueError(f"comparison: {sorted(lengths)} samples of one round each are not pairs")
    losses = (len(ours.first_losses), len(other.first_losses))
    if losses[0] != losses[1] or not losses[0]:
        raise ValueError(
            f"{where}: first_losses holds {losses[0]} of ours, {losses[1]} of the peer"
        )
    return ours, other


def _side(stored: Mapping[str, Any], where: str) -> Side:
    check_fields(stored, SIDE_FIELDS, where)
    check_lists(stored, SIDE_LISTS, where)
    if len(stored["wall_s"]) != len(stored["processor_s"]):
        raise ValueError(f"{where}: wall_s and processor_s are not of the same blocks")
    if min(stored["wall_s"], default=0) <= 0 or min(stored["processor_s"], default=0) < 0:
        raise ValueError(f"{where}: a block took no time")
    if not stored["peak_bytes"] > 0 or stored["base_bytes"] < 0:
        raise ValueError(f"{where}: peak_bytes or base_bytes is not above 0")
    names = (*SIDE_FIELDS, *SIDE_LISTS)
    return Side(**{name: stored[name] for name in names})


def find_contradictions(comparison: Comparison) -> list[str]:
    """Returns stored ratios that the samples contradict."""
    if comparison.ours is None or comparison.other is None:
        return []
    stored, found = comparison.content.get("derived"), []
    for name, value in derive(comparison.ours, comparison.other).items():
        kept = stored.get(name) if isinstance(stored, Mapping) else None
        parts = value if isinstance(value, dict) else {"": value}
        kept_parts = kept if isinstance(value, dict) else {"": kept}
        for part, derived in parts.items():
            there = kept_parts.get(part) if isinstance(kept_parts, Mapping) else None
            if not agree(there, derived) or not is_of_kind(there, (*NUMBER, NoneType)):
                label = f"{name}.{part}".rstrip(".")
                found.append(f"{label} is {there} in the record, {derived} by its samples")
    return found
