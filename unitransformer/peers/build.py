"""Builds each peer from a run config, with the shape of this suite's network and no download.

B batch | T positions | K masked positions | D width | V classes
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unitransformer.config import ModelConfig, RunConfig
from unitransformer.objectives import IGNORED, Batch
from unitransformer.peers.catalog import PeerName
from unitransformer.peers.plain import NanoGPT, PlainNetwork
from unitransformer.transformer import Transformer

Loss = Callable[[nn.Module, Any], Tensor]


class PeerObjective(nn.Module):
    """A network and its loss as one module, which is compiled and trained like `Objective`."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: Any) -> Tensor:
        """Returns the mean cross entropy over the targets that count."""
        return self.loss(self.network, batch)


def build_peer(name: PeerName, form: str, config: RunConfig) -> PeerObjective:
    """Returns a peer on the CPU; plain networks have the initial weights of `Transformer`.

    Raises:
        ImportError: the package of this peer is not installed.
    """
    model = config.model
    match name:
        case "plain":
            plain = PlainNetwork(model)
            plain.load(Transformer(model, seed=config.seed).state_dict())
            return PeerObjective(plain, _PLAIN_LOSSES[form])
        case "nanogpt":
            nano = NanoGPT(model)
            nano.load(Transformer(model, seed=config.seed).state_dict())
            return PeerObjective(nano, lambda net, b: net(b["inputs"], b["targets"]))
        case "gpt2":
            return PeerObjective(_gpt2(model), _GPT2_LOSSES[form])
        case "bert":
            return PeerObjective(_bert(model), _own_loss)
        case "modernbert":
            return PeerObjective(_modernbert(model, model.feedforward_width), _own_loss)
        case "modernbert-narrow":
            # A gated feed-forward has three matrices: at 2/3 of the width as many weights as two.
            return PeerObjective(_modernbert(model, 2 * model.feedforward_width // 3), _own_loss)
        case "vit":
            return PeerObjective(_vit(model), lambda net, b: net(b["inputs"], b["targets"]).loss)
        case "timm":
            return PeerObjective(
                _timm(model),
                lambda net, b: functional.cross_entropy(net(b["inputs"]), b["targets"]),
            )


def peer_batch(batch: Batch) -> dict[str, Tensor]:
    """Adds what data collators of peers return: of masked tokens the labels of all positions."""
    prepared: dict[str, Any] = dict(batch)
    if (positions_BK := batch.get("positions")) is not None:
        labels_BT = torch.full_like(batch["inputs"], IGNORED)
        prepared["labels"] = labels_BT.scatter(1, positions_BK, batch["targets"])
    return prepared


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits_NV = logits.reshape(-1, logits.shape[-1])
    return functional.cross_entropy(logits_NV, targets.reshape(-1), ignore_index=IGNORED)


def _masked_logits(network: Any, batch: Any) -> Tensor:
    is_masked = batch["labels"] != IGNORED
    states_ND = network.states(batch["inputs"])[is_masked]
    return _cross_entropy(network.head(states_ND), batch["labels"][is_masked])


_PLAIN_LOSSES: dict[str, Loss] = {
    "": lambda net, b: _cross_entropy(net(b["inputs"]), b["targets"]),
    "all logits": lambda net, b: _cross_entropy(net(b["inputs"]), b["labels"]),
    "masked logits": _masked_logits,
}
_GPT2_LOSSES: dict[str, Loss] = {
    # The next tokens are given: the model would take them from the inputs, one fewer.
    "own loss": lambda net, b: (
        net(b["inputs"], labels=b["inputs"], shift_labels=b["targets"], use_cache=False).loss
    ),
    "cross entropy": lambda net, b: _cross_entropy(
        net(b["inputs"], use_cache=False).logits, b["targets"]
    ),
}


def _own_loss(network: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = network(batch["inputs"], labels=batch["labels"]).loss
    return loss


def _from_config(kind: Any, config: Any) -> nn.Module:
    config._attn_implementation = "sdpa"
    network: nn.Module = kind(config)
    return network


def _gpt2(model: ModelConfig) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=model.num_classes,
        n_positions=model.num_positions,
        n_embd=model.width,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.feedforward_width,
        activation_function=model.activation,
        tie_word_embeddings=model.tied_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return _from_config(GPT2LMHeadModel, config)


def _bert(model: ModelConfig) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=model.num_classes,
        max_position_embeddings=model.num_positions,
        hidden_size=model.width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.feedforward_width,
        hidden_act=model.activation,
        tie_word_embeddings=model.tied_head,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _from_config(BertForMaskedLM, config)


def _modernbert(model: ModelConfig, feedforward_width: int) -> nn.Module:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(
        vocab_size=model.num_classes,
        max_position_embeddings=model.num_positions,
        hidden_size=model.width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=feedforward_width,
        hidden_activation=model.activation,
        classifier_activation=model.activation,
        tie_word_embeddings=model.tied_head,
        sparse_prediction=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=None,
        sep_token_id=None,
    )
    return _from_config(ModernBertForMaskedLM, config)


def _vit(model: ModelConfig) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_channels=model.num_channels,
        hidden_size=model.width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        intermediate_size=model.feedforward_width,
        hidden_act=model.activation,
        num_labels=model.num_classes,
        problem_type="single_label_classification",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _from_config(ViTForImageClassification, config)


def _timm(model: ModelConfig) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    assert model.image_size is not None
    assert model.patch_size is not None
    network: nn.Module = VisionTransformer(
        img_size=model.image_size,
        patch_size=model.patch_size,
        in_chans=model.num_channels,
        num_classes=model.num_classes,
        embed_dim=model.width,
        depth=model.num_layers,
        num_heads=model.num_heads,
        mlp_ratio=model.feedforward_width / model.width,
        act_layer=nn.ReLU if model.activation == "relu" else nn.GELU,
    )
    return network
