"""The dense MLP: norm, one product for gate and up, SwiGLU, and the down projection.

H hidden, I intermediate, S ranks: mlp_norm [H]; gate_up [2 I / S, H], gate rows, then up rows; down [H, I / S].
"""

import torch

from kernels.model.blocks.block import Costs, Delta, Pass, Weights
from kernels.model.config import ModelConfig
from kernels.model.parameter import Parameter
from kernels.ops import swiglu


def parameters(config: ModelConfig) -> list[Parameter]:
    """Lists its tensors, named as inside a layer."""
    H, I = config.hidden_size, config.intermediate_size
    gate_up = tuple(f"mlp.{x}_proj.weight" for x in ("gate", "up"))
    return [
        Parameter("mlp_norm", (H,), 0, ("post_attention_layernorm.weight",), None),
        Parameter("gate_up", (I, I), H, gate_up, 0, target="mlp"),
        Parameter("down", (H,), I, ("mlp.down_proj.weight",), 1, to_stream=True, target="mlp"),
    ]


def costs(config: ModelConfig) -> Costs:
    """Counts what the MLP takes in one layer."""
    H, I = config.hidden_size, config.intermediate_size
    return Costs(
        active=sum(p.elements for p in parameters(config)),
        kept=H + 2 * I,  # the residual stream, gate and up
        cheap=H + I,  # the norm, the product of gate and up
        working=3 * I,
    )


def forward(run: Pass, weights: Weights, x: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the residual stream, and down(silu(gate) up) of its norm."""
    h, x = run.add_and_norm(x, delta, weights["mlp_norm"])
    run.seen("mlp_norm", h)
    gate_up = run.config.ops.project(h, weights["gate_up"], run.config.leaves, groups=run.layout.groups)
    gate_up = run.adapted(parameters, weights, "gate_up", h, gate_up)
    run.seen("gate_up", gate_up)
    y = swiglu(gate_up)
    run.seen("swiglu", y)
    run.recompute((y,), _gated, gate_up)
    del gate_up  # the largest activation: a server has no use for it any more
    out = run.adapted(parameters, weights, "down", y, run.row_parallel(y, weights["down"]))
    run.seen("down", out)
    return x, out


def _gated(gate_up: torch.Tensor) -> tuple[torch.Tensor]:
    return (swiglu(gate_up),)
