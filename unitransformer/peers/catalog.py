"""Lists the peers: other implementations that train a network of the same shape."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from unitransformer.config import Recipe

PeerName = Literal[
    "plain", "nanogpt", "gpt2", "bert", "modernbert", "modernbert-narrow", "vit", "timm"
]
PEER_NAMES: tuple[PeerName, ...] = get_args(PeerName)
OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """An implementation to compare with.

    Each form is another way to compute its loss, or only ("",). The best one counts.
    """

    name: PeerName
    title: str
    recipes: Sequence[Recipe]
    package: str | None  # that it needs beyond the dependencies of this project
    differs: str | None  # in its mathematics; None: it starts with our weights and has our losses
    forms: Sequence[str] = ("",)

    def forms_for(self, recipe: Recipe) -> Sequence[str]:
        return BERT_FORMS if self.name == "plain" and recipe == "bert" else self.forms


# The logits of all positions as most people write it, or of the masked ones alone.
BERT_FORMS = ("all logits", "masked logits")

PEERS: dict[PeerName, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="plain",
            title="plain PyTorch (nn.MultiheadAttention)",
            recipes=("gpt", "bert", "vit"),
            package=None,
            differs=None,
        ),
        Peer(
            name="nanogpt",
            title="nanoGPT-style code",
            recipes=("gpt",),
            package=None,
            differs=None,
        ),
        Peer(
            name="gpt2",
            title="Hugging Face GPT-2",
            recipes=("gpt",),
            package="transformers",
            differs="learned positions, a final norm",
            forms=("own loss", "cross entropy"),
        ),
        Peer(
            name="bert",
            title="Hugging Face BERT",
            recipes=("bert",),
            package="transformers",
            differs="learned positions, post-norm, a prediction head",
        ),
        Peer(
            name="modernbert",
            title="Hugging Face ModernBERT, sparse prediction",
            recipes=("bert",),
            package="transformers",
            differs="rotary positions, a gated feed-forward of 3 matrices, a prediction head",
        ),
        Peer(
            name="modernbert-narrow",
            title="Hugging Face ModernBERT, sparse prediction, 2/3 feed-forward width",
            recipes=("bert",),
            package="transformers",
            differs="rotary positions, a gated feed-forward with as many weights, a prediction "
            "head",
        ),
        Peer(
            name="vit",
            title="Hugging Face ViT",
            recipes=("vit",),
            package="transformers",
            differs="learned positions, a final norm",
        ),
        Peer(
            name="timm",
            title="timm VisionTransformer",
            recipes=("vit",),
            package="timm",
            differs="learned positions, a final norm",
        ),
    )
}


def peers_of(recipe: Recipe) -> list[Peer]:
    return [peer for peer in PEERS.values() if recipe in peer.recipes]
