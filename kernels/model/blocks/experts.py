"""The mixture of experts: norm, router, the chosen experts' gated MLPs, and their weighted sum.

E experts, k chosen, H hidden, I moe_intermediate_size, S ranks: mlp_norm [H]; router [E, H], whole on every rank;
experts_gate_up [E / S 2 I, H], of each expert gate and up rows in turns of `STRIPE`; experts_down [E / S H, I]. A rank holds
consecutive experts, each whole.

Orders: the router's logits are float32 roots of the matmul tree; an expert's two contractions are one leaf each, since no rank
ever holds a part of them; its output is rounded to the model's dtype; the weighted sum is on the tree of experts
(`kernels.ops.combine`). So a token's choice and its sum are the same bits under every number of ranks and in training.
"""

import torch

from kernels.device import implementation
from kernels.model.adapter import A, B
from kernels.model.blocks.block import Costs, Delta, Pass, Weights
from kernels.model.config import ModelConfig
from kernels.model.experts import Experts
from kernels.model.operations import not_seen
from kernels.model.parameter import Parameter
from kernels.ops import (
    Mixture,
    combine,
    dispatch,
    gated_experts,
    gather,
    route,
    route_and_dispatch,
    swiglu,
    with_expert_low_rank_gradient,
)
from kernels.ops.dispatch import Slots
from kernels.ops.experts import STRIPE, TILE


def _experts(config: ModelConfig) -> Experts:
    assert config.experts is not None
    return config.experts


def parameters(config: ModelConfig) -> list[Parameter]:
    """Lists its tensors, named as inside a layer."""
    own, H = _experts(config), config.hidden_size
    E, I = own.count, own.intermediate_size
    up = tuple(f"mlp.experts.{e}.{x}_proj.weight" for e in range(E) for x in ("gate", "up"))
    down = tuple(f"mlp.experts.{e}.down_proj.weight" for e in range(E))
    return [
        Parameter("mlp_norm", (H,), 0, ("post_attention_layernorm.weight",), None),
        Parameter("router", (E,), H, ("mlp.gate.weight",), None),
        Parameter("experts_gate_up", (2 * E * I,), H, up, 0, tensors=(I,) * (2 * E), stripe=STRIPE, target="experts"),
        Parameter("experts_down", (E * H,), I, down, 0, tensors=(H,) * E, to_stream=True, target="experts"),
    ]


def costs(config: ModelConfig) -> Costs:
    """Counts what a mixture of experts takes in one layer."""
    own, H = _experts(config), config.hidden_size
    E, k, I = own.count, own.chosen, own.intermediate_size
    return Costs(
        active=H + E * H + k * 3 * I * H,
        experts=(E, k, 3 * I * H),
        kept=2 * H
        + 2 * k * I
        + k * H,  # the residual stream, its norm; of every choice gate and up, and the expert's output
        cheap=k * (H + I),  # of every choice the expert's input, and the product of gate and up
        working=k * (3 * I + 2 * H),
        cut=False,  # every token may choose the experts of one rank
        spare=E * (TILE - 1) // k,
    )


def forward(run: Pass, weights: Weights, x: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
    """Returns the residual stream, and the weighted sum of what the chosen experts make of its norm: one that samples alone
    leaves it to the next norm, unless somebody looks."""
    config, shard, own = run.config, run.group.shard, _experts(run.config)
    h, x = run.add_and_norm(x, delta, weights["mlp_norm"])
    run.seen("mlp_norm", h)
    matmul = config.ops.matmul
    logits = matmul(h, weights["router"], config.leaves, groups=run.layout.groups, out_dtype=torch.float32)
    run.seen("router", logits)
    mine = own.count // shard.size
    align = implementation("experts", h.device).align_of(len(h))
    where = (shard.rank * mine, mine, align)
    if torch.is_grad_enabled() or config.numerics != "exact":  # torch's matmuls want sorted rows
        ids, share = route(logits, own.chosen, own.normalize)
        slots = dispatch(ids, *where, run.layout.groups)
        z = _gated(run, h, weights, slots)
    else:
        ids, share, slots = route_and_dispatch(logits, own.chosen, own.normalize, *where)
        z = gated_experts(h, weights["experts_gate_up"], slots)
    run.seen("route", ids, share)
    share = run.routed(run.layer, ids, logits, share)
    y = config.ops.expert_matmul(z, weights["experts_down"], slots)
    y = _adapted(run, weights, "experts_down", z, y, slots)
    del z
    if run.cache and shard.size == 1 and config.ops.seen is not_seen:
        return x, Mixture(y, share, ids, slots, config.leaves)
    partial = combine(y, share, ids, slots, config.leaves // shard.size, run.partial_dtype(y.dtype))
    out = run.group.all_reduce(partial, h.dtype)
    run.seen("experts", out)
    return x, out


def _adapted(run: Pass, weights: Weights, name: str, x: torch.Tensor, y: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Returns y, which is x times the experts' weight `name`, as it is; in training its backward pass gives their adapters, if
    there are any, their gradient."""
    adapter = run.config.adapter
    if adapter is None or name + A not in weights or not torch.is_grad_enabled():
        return y
    of = next(p for p in parameters(run.config) if p.name == name)
    return with_expert_low_rank_gradient(
        y, x, weights[name + A], weights[name + B], adapter.scale(of), of.stripe, slots
    )


def _gated(run: Pass, h: torch.Tensor, weights: Weights, slots: Slots) -> torch.Tensor:
    """Returns silu(gate) up of every choice. The experts' inputs, k copies of a token's norm, may be forgotten."""
    rows = gather(h, slots)
    run.recompute((rows,), _rows, h, slots)
    gate_up = run.config.ops.expert_matmul(rows, weights["experts_gate_up"], slots)
    gate_up = _adapted(run, weights, "experts_gate_up", rows, gate_up, slots)
    z = swiglu(gate_up, STRIPE)
    run.recompute((z,), _product, gate_up)
    return z


def _rows(h: torch.Tensor, slots: Slots) -> tuple[torch.Tensor]:
    return (gather(h, slots),)


def _product(gate_up: torch.Tensor) -> tuple[torch.Tensor]:
    return (swiglu(gate_up, STRIPE),)
