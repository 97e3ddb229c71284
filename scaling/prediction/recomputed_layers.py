"""Moments in the backward pass of layers whose forward pass is computed again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from scaling.prediction.layer_sizes import (
    added_layer_bytes,
    copied_layer_bytes,
    copied_patches_bytes,
    count_head_numbers,
    gradient_size,
    new_gradient_size,
    product_size,
    sizes_between_products,
)
from scaling.prediction.moment import Moment
from scaling.prediction.parameters import count_numbers, layer_parameters
from scaling.prediction.rank_states import RankStates, rank_states
from unitransformer.config import RunConfig
from unitransformer.costs.flops import count_predicted_positions
from unitransformer.costs.memory import keeps_gradients, layer_bytes, saved_by_kind


def recomputed_layers(
    config: RunConfig, common: Mapping[str, Any], remaining: int, scratch: int
) -> Iterator[Moment]:
    """Yields moments in the backward pass of layers that are recomputed.

    What is alive changes linearly from the layer before the last to the second one, so these stand
    for all between them. The last one may compute only some positions, and the first one has no
    next one to gather.
    """
    layers = config.model.num_layers
    names = {0: "last layer", 1: "layer before the last", layers - 2: "second layer"}
    names = {layers - 1: "first layer"} | {n: name for n, name in names.items() if 0 <= n < layers}
    sizes = _RecomputedSizes.of(config)
    for finished, name in names.items():
        layer = _RecomputedLayer(config, common, remaining, scratch, sizes, finished, name)
        yield from layer.moments()


@dataclass(frozen=True, kw_only=True)
class _RecomputedSizes:
    """Bytes and numbers of a layer whose forward pass is computed again."""

    size: int  # of a number that a matrix product reads
    residual: int  # of a number between the layers
    norm: int  # of a number that a norm reads
    results: int  # that the recomputation makes and nothing kept, at all positions
    kept: Mapping[str, int]  # what the forward pass keeps of all layers, by kind
    kept_of_last: int  # what it keeps of the last layer,
    kept_of_other: int  # and of each other one
    logits: int

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        model, parallel, size = config.model, config.parallel, product_size(config)
        layers, width = model.num_layers, model.width
        saved = saved_by_kind(config)
        logits = saved.pop("logits")
        kept = {kind: size for kind, size in saved.items() if size and kind != "head"}
        if "16-bit weights" in kept:
            # One layer is at work. The copy of the head is gone with its backward pass.
            kept["16-bit weights"] = copied_layer_bytes(config) + copied_patches_bytes(config)
        other = added_layer_bytes(config)
        residual, norm = sizes_between_products(config)
        input_bytes = residual * config.batch_size * config.sequence_length * width
        # Without a cast between them, the input of a layer is that of its norm.
        shared = input_bytes if norm == residual else 0
        # Recomputation ends at the input of the last product, whose kept result is never read.
        is_selective = parallel.activation_checkpointing == "selective"
        unused = size * config.batch_size * config.sequence_length * width if is_selective else 0
        return cls(
            size=size,
            residual=residual,
            norm=norm,
            results=layer_bytes(config) - (other - input_bytes) - shared + unused,
            kept=kept,
            kept_of_last=kept["layers"] - (layers - 1) * other,
            kept_of_other=other,
            logits=logits if keeps_gradients(config) else 0,
        )


@dataclass(frozen=True)
class _RecomputedLayer:
    """The backward pass of one layer that is recomputed, after that of `finished` later ones.

    In this order:

    1. The forward pass of the layer is computed again; all its results are there.
    2. The second matrix of the feed-forward: a product makes the gradient of its input from that of
       the layer's result, and another one that of the matrix.
    3. The activation makes the gradient of its input from that of its result.
    4. What is left of the results goes, one by one, down to the projection of queries, keys and
       values, which reads its input and the gradients of all three.
    5. If weights are sharded, the whole ones are dropped, and gradients are copied into one array
       to be reduced. It stays until the next layer is reduced.

    Most is alive in steps 2, 3, 4 and 5. Beside it, earlier layers keep their inputs; strategies
    that shard nothing have the gradients of later layers and the head, others shards of them.
    """

    config: RunConfig
    common: Mapping[str, Any]
    remaining: int  # gradients from before
    scratch: int
    sizes: _RecomputedSizes
    finished: int
    name: str

    def moments(self) -> Iterator[Moment]:
        yield from self._feedforward()
        yield self._projection()
        if self._states.reduction:
            yield self._reduction()

    def _feedforward(self) -> Iterator[Moment]:
        sizes, hidden, width = self.sizes, self.config.model.feedforward_width, self._width
        casts = sizes.size * width if sizes.residual != sizes.size else 0
        result = sizes.size * hidden + casts
        # ReLU keeps its result, which without dropout is also the input of the second matrix.
        activation = (2 if self._has_shared_input else 1) * sizes.size * hidden
        of_matrix = self._kept_size * width * hidden
        for results, gradients in (
            (result + self.scratch * hidden, 0),
            (result, self._new_matrix()),
            (activation, of_matrix),
        ):
            yield self._moment(
                "backward pass",
                gradients=gradients,
                results=results + sizes.residual * width,
                recomputed=sizes.results * self._rows // self._all_rows,
                communication=self._states.layer_gradients,
            )

    def _projection(self) -> Moment:
        sizes, width = self.sizes, self._width
        layer_numbers = count_numbers(layer_parameters(self.config.model))
        of_matrix = self._new_size * 3 * width**2
        norm = sizes.norm if sizes.norm != sizes.residual else 0
        return self._moment(
            "end of the backward pass",
            gradients=self._kept_size * layer_numbers if self._is_whole else of_matrix,
            results=width * (4 * sizes.size + sizes.residual),
            recomputed=self._rows * width * (sizes.size + norm),
            communication=self._states.all_layer_gradients,
        )

    def _reduction(self) -> Moment:
        states = self._states
        return self._moment(
            "reduction",
            gathered=self._earlier_gathered() - states.released_layer,
            results=self._width * self.sizes.residual,
            kept=self._kept(self.finished + 1),
            communication=states.head_gradients + states.reduction,
        )

    def _moment(
        self,
        name: str,
        *,
        gradients: int = 0,
        gathered: int | None = None,
        results: int,
        kept: dict[str, int] | None = None,
        recomputed: int | None = None,
        communication: int,
    ) -> Moment:
        """Adds what is alive in all steps.

        Args:
            gradients: of the matrix at hand, or of the matrices of this layer that are done.
            gathered: whole weights; by default those of this layer and of the next one.
            results: gradients of the layer's results, for each position.
            kept: what forward passes kept and is still there; by default that of this layer too.
            recomputed: results of the recomputation that are still there.
            communication: whole gradients of sharded weights, and buffers.
        """
        states = self._states
        waiting = states.reduced_layer if self.finished else 0
        if gathered is None:
            gathered = self._earlier_gathered() + states.gathered_layer
        else:  # in a reduction, which has waited for the one before
            waiting = 0
        activations = self._kept(self.finished) if kept is None else kept
        activations |= {"gradients of a layer's results": self._rows * results}
        if recomputed is not None:
            activations["recomputed layer"] = recomputed
        return Moment(
            **self.common,
            moment=f"{name} of the {self.name}",
            gradients=self.remaining + self._finished_gradients() + gradients,
            gathered=gathered,
            activations=activations,
            logits=self.sizes.logits,
            communication=communication
            + waiting
            + self.finished * states.layer_shard
            + states.buffers
            + states.kept_buffers,
        )

    def _earlier_gathered(self) -> int:
        """Returns the whole weights that are there beside those of this layer alone."""
        states = self._states
        is_first = self.finished == self.config.model.num_layers - 1
        gathered = states.gathered + (0 if is_first else states.next_layer)
        return gathered - states.released_head - self.finished * states.released_layer

    def _kept(self, finished: int) -> dict[str, int]:
        """Returns what the forward pass kept of all but the last `finished` layers."""
        kept = dict(self.sizes.kept)
        if finished:
            kept["layers"] -= self.sizes.kept_of_last + (finished - 1) * self.sizes.kept_of_other
        return kept

    def _finished_gradients(self) -> int:
        """Returns the whole gradients of the head and of finished layers, if they stay."""
        if not self._is_whole:
            return 0
        numbers = count_head_numbers(self.config)
        numbers += self.finished * count_numbers(layer_parameters(self.config.model))
        return gradient_size(self.config.parallel) * numbers

    def _new_matrix(self) -> int:
        """Returns the gradient of the second matrix as computed, or autocast's float32 copy.

        The copy is made when the input of the product is gone.
        """
        numbers, size = self._width * self.config.model.feedforward_width, self.sizes.size
        product = (min(self._new_size, size) + self.scratch) * numbers
        if self._new_size <= size:
            return product
        is_gone = not self._has_shared_input
        gone = size * self._rows * self.config.model.feedforward_width if is_gone else 0
        return max(product, self._new_size * numbers - gone)

    @property
    def _states(self) -> RankStates:
        return rank_states(self.config)

    @property
    def _width(self) -> int:
        return self.config.model.width

    @property
    def _all_rows(self) -> int:
        return self.config.batch_size * self.config.sequence_length

    @property
    def _rows(self) -> int:
        """Positions that the layer computes."""
        predicted = self.config.batch_size * count_predicted_positions(self.config)
        return self._all_rows if self.finished else predicted

    @property
    def _has_shared_input(self) -> bool:
        model = self.config.model
        return model.activation == "relu" and model.dropout == 0

    @property
    def _is_whole(self) -> bool:
        """Whether gradients stay as they are computed."""
        return self.config.parallel.strategy == "single" and self.config.accumulate == 1

    @property
    def _kept_size(self) -> int:
        return 4 if self._is_whole else 0

    @property
    def _new_size(self) -> int:
        """Bytes of a number of a gradient just computed, unless `layer_gradients` counts it."""
        return 0 if self._states.layer_gradients else new_gradient_size(self.config)
