"""The blocks of a layer. A block is one file: its parameters, its costs and its forward pass.

A new one is a module here that satisfies `Block`, and a line in `blocks_of`.
"""

from kernels.model.blocks import attention, experts, mlp
from kernels.model.blocks.block import (
    Block,
    Costs,
    Delta,
    Pass,
    Recompute,
    Routed,
    Weight,
    Weights,
    add_and_norm,
    no_recompute,
    not_told,
)
from kernels.model.config import ModelConfig


def blocks_of(config: ModelConfig, layer: int) -> tuple[Block, ...]:
    """Returns the blocks of a layer, in the order in which they run."""
    return attention, experts if config.sparse(layer) else mlp
