"""Wraps the model as FSDP2 wants it: modules that hold parameters and call the one definition in kernels.model."""

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from kernels.collectives import TreeGroup
from kernels.model import (
    Delta,
    Layout,
    ModelConfig,
    OuterWeights,
    Parameter,
    Recompute,
    Routed,
    Weight,
    declared,
    decoder_layer,
    forward,
    layer_parameters,
    no_recompute,
    not_told,
    position_table,
    token_logprobs,
    token_values,
)
from kernels.model.adapter import A, B
from kernels.ops import Mixture, Quantized, Truncation
from trainer.batch import Batch
from trainer.recompute import Checkpointing, Forgetting
from trainer.routing import Routing

HEAD = "head"


def gradients_in_float32(module: nn.Module) -> None:
    """Keeps gradients float32: FSDP2 hands a module its parameters as rounded copies of the masters."""
    for parameter in module.parameters(recurse=False):
        if parameter.requires_grad and parameter.grad_dtype != torch.float32:
            parameter.grad_dtype = torch.float32


def _held(parameter: Parameter, dtype: torch.dtype) -> nn.Parameter:
    held = torch.empty(parameter.shape, dtype=torch.float32 if parameter.trained else dtype)
    return nn.Parameter(held, requires_grad=parameter.trained)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Returns a parameter as ops read it: what FSDP2 gathered, or the master itself where one rank holds all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class Block(nn.Module):
    """Holds one layer's weights."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, checkpointing: Checkpointing) -> None:
        super().__init__()
        self.config, self.index, self.checkpointing = config, index, checkpointing
        self.stored: dict[str, Quantized] = {}  # of a model that is not trained: `trainer.rows.hold_as_stored`
        for parameter in layer_parameters(config, index):
            self.register_parameter(parameter.name, _held(parameter, dtype))

    def forward(
        self,
        x: torch.Tensor,
        delta: Delta,
        layout: Layout,
        table: tuple[torch.Tensor, torch.Tensor],
        routed: Routed = not_told,
    ) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
        """Computes the layer, keeping for the backward pass what `checkpointing` says; x and delta [T, hidden]."""
        given = (x, delta, layout, table, routed)
        if not torch.is_grad_enabled() or self.checkpointing == "none":
            return self._layer(*given)
        if self.checkpointing == "layer":
            return checkpoint(self._layer, *given, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        with Forgetting() as forgetting:
            return self._layer(*given, forgetting.again)

    def _layer(
        self,
        x: torch.Tensor,
        delta: Delta,
        layout: Layout,
        table: tuple[torch.Tensor, torch.Tensor],
        routed: Routed,
        recompute: Recompute = no_recompute,
    ) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
        gradients_in_float32(self)
        weights: dict[str, Weight] = {name: whole(p) for name, p in self.named_parameters(recurse=False)}
        weights |= self.stored
        given = (weights, self.index, x, delta, layout, None, table)
        return decoder_layer(self.config, TreeGroup(), *given, recompute, routed)


class TrainerModel(nn.Module):
    """Computes token log-probabilities of packed sequences. Built on the meta device: `torch.device("meta")` around it.

    A tied head is held as a second parameter, so that each of its two uses sums its gradient on its own tree; the optimizer
    adds the two roots and keeps the copies equal.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, checkpointing: Checkpointing = "none"
    ) -> None:
        """`dtype` of activations, and of frozen weights; what is trained are float32 masters, and so are their gradients."""
        super().__init__()
        self.config, self.dtype = config, dtype
        outer = {p.name: p for p in declared(config)}
        self.embed = _held(outer["embed"], dtype)
        self.norm = _held(outer["norm"], dtype)
        self.head = _held(outer.get("head", outer["embed"]), dtype)
        for name in (HEAD + A, HEAD + B):  # of its adapter
            if name in outer:
                self.register_parameter(name, _held(outer[name], dtype))
        self.layers = nn.ModuleList(Block(config, i, dtype, checkpointing) for i in range(config.layers))
        with torch.device("cpu"):
            self.table = position_table(config)

    def forward(
        self,
        token_ids: torch.Tensor,
        layout: Layout,
        rows: torch.Tensor,
        row_groups: torch.Tensor,
        temperatures: torch.Tensor,
        truncation: Truncation | None = None,
        routed: Routed = not_told,
    ) -> torch.Tensor:
        """Computes float32 [R]: log-prob of token_ids[rows] given what precedes each; `row_groups` int64 [G + 1] are the
        offsets of the gradient's leaves among the rows. `truncation`: those of the R whose distribution top-k, top-p or min-p
        cut. `routed` is told what the routers choose. With a value head: what it says before each of these tokens."""
        hidden = self.hidden(token_ids, layout, routed)
        if self.config.head == "value":
            return token_values(self.config, hidden[rows - 1], whole(self.head), row_groups)
        of_rows = (token_ids[rows], temperatures, row_groups, truncation, self._low_rank())
        return token_logprobs(self.config, hidden[rows - 1], whole(self.head), *of_rows)

    def _low_rank(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns A and B of the head's adapter, if it has one."""
        both = [self._parameters.get(name) for name in (HEAD + A, HEAD + B)]
        return (whole(both[0]), whole(both[1])) if both[0] is not None and both[1] is not None else None

    def hidden(self, token_ids: torch.Tensor, layout: Layout, routed: Routed = not_told) -> torch.Tensor:
        """Computes what the LM head reads: [T, H] in the dtype of activations."""
        gradients_in_float32(self)
        outer = OuterWeights(whole(self.embed), whole(self.norm), whole(self.head))

        def run_layer(i: int, x: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
            return self.layers[i](x, delta, layout, self.table, routed)

        return forward(self.config, TreeGroup(), outer, run_layer, token_ids, layout, self.dtype)


def batch_logprobs(
    model: TrainerModel,
    batch: Batch,
    leaf_sequences: int,
    device: torch.device | str,
    routing: Routing | None = None,
) -> torch.Tensor:
    """Computes the log-probs of the loss rows of `batch`, float32 [R], as one micro-batch of leaves of `leaf_sequences`
    sequences. Every row is divided by its own temperature and cut by its own filters. `routing` watches the routers."""

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    layout = Layout.packed(batch.lengths.tolist(), [leaf_sequences] * (batch.sequences // leaf_sequences), device)
    if routing:
        routing.begin(layout.groups)
    cut = np.flatnonzero((batch.top_k > 0) | (batch.top_p < 1) | (batch.min_p > 0))
    logprobs = model(
        there(batch.token_ids),
        layout,
        there(batch.rows),
        there(np.concatenate([[0], np.cumsum(batch.counts)])[::leaf_sequences]),
        there(batch.temperatures),
        Truncation(there(cut), there(batch.top_k[cut]), there(batch.top_p[cut]), there(batch.min_p[cut])),
        routing.told if routing else not_told,
    )
    if routing:
        routing.end(len(batch.token_ids))
    return logprobs  # type: ignore[no-any-return]
