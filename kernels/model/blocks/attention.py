"""Causal attention with grouped heads: norm, one product for q, k and v, rope, attention, and the output projection.

H hidden, D head_dim, Q / K heads and kv heads of the whole model, S ranks: attn_norm [H]; qkv [(Q + 2 K) D / S, H], query rows,
then key rows, then value rows; qkv_bias [(Q + 2 K) D / S], q_norm and k_norm [D] in families that have them; o [H, Q D / S].
"""

import math

import torch

from kernels.model.blocks.block import Costs, Delta, Pass, Weights
from kernels.model.config import ModelConfig
from kernels.model.layout import attend
from kernels.model.parameter import Parameter
from kernels.ops import add_bias, norm_rope
from kernels.ops.norm_rope import Stored


def _widths(config: ModelConfig) -> tuple[int, int]:
    """Columns of all query heads, and of all key heads."""
    return config.heads * config.head_dim, config.kv_heads * config.head_dim


def parameters(config: ModelConfig) -> list[Parameter]:
    """Lists its tensors, named as inside a layer."""
    H, D = config.hidden_size, config.head_dim
    q, kv = _widths(config)
    projections = [f"self_attn.{x}_proj" for x in "qkv"]
    out = [
        Parameter("attn_norm", (H,), 0, ("input_layernorm.weight",), None),
        Parameter("qkv", (q, kv, kv), H, tuple(f"{name}.weight" for name in projections), 0, target="attention"),
    ]
    if config.family.qkv_bias:
        out.append(Parameter("qkv_bias", (q, kv, kv), 0, tuple(f"{name}.bias" for name in projections), 0))
    if config.family.qk_norm:
        out += [Parameter(f"{x}_norm", (D,), 0, (f"self_attn.{x}_norm.weight",), None) for x in "qk"]
    o = Parameter("o", (H,), q, ("self_attn.o_proj.weight",), 1, to_stream=True, target="attention")
    return [*out, o]


def costs(config: ModelConfig) -> Costs:
    """Counts what attention takes in one layer."""
    H = config.hidden_size
    q, kv = _widths(config)
    return Costs(
        active=sum(p.elements for p in parameters(config)),
        pairs=2 * q,  # with keys, with values
        cached=2 * kv,
        kept=H + (q + 2 * kv) + q,  # the residual stream, qkv, attention's output
        cheap=H + q + kv,  # the norm; q and k turned
        working=(q + 2 * kv) + (q + kv) + q,
    )


def forward(run: Pass, weights: Weights, x: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends to the keys of the same tokens, or of pages. In the last layer only the rows that the layout wants go on."""
    config, layout, groups = run.config, run.layout, run.layout.groups
    heads, kv_heads = config.heads // run.group.shard.size, config.kv_heads // run.group.shard.size
    h, x = run.add_and_norm(x, delta, weights["attn_norm"])
    run.seen("attn_norm", h)
    qkv = run.adapted(parameters, weights, "qkv", h, _project(run, weights, h)).view(
        -1, heads + 2 * kv_heads, config.head_dim
    )
    norms = (weights["q_norm"], weights["k_norm"]) if config.family.qk_norm else None
    run.seen("qkv", qkv)
    qk, v = qkv.split((heads + kv_heads, kv_heads), 1)
    turned = (qk, norms, config.rms_eps, run.table, layout.positions, kv_heads)
    held = run.cache.rows(run.layer) if run.cache else None
    q, k = norm_rope(*turned, groups=groups, stored=Stored(*held, layout.slots, v) if held else None)
    run.seen("rope", q, k)
    run.recompute((q, k), norm_rope, *turned)
    if layout.wanted is not None and run.layer == config.layers - 1:  # of the others only keys and values are read
        x, q, layout = x[layout.wanted], q[layout.wanted], layout.ends(layout.wanted)
    a = attend(config.ops.attention, q, (k, v), held or (k, v), layout, math.sqrt(1 / config.head_dim))
    run.seen("attention", a)
    a = a.reshape(-1, heads * config.head_dim)
    out = run.adapted(parameters, weights, "o", a, run.row_parallel(a, weights["o"]))
    run.seen("o", out)
    return x, out


def _project(run: Pass, weights: Weights, h: torch.Tensor) -> torch.Tensor:
    """Returns q, k and v side by side; a bias is added before the product is rounded."""
    project, leaves, groups = run.config.ops.project, run.config.leaves, run.layout.groups
    if not run.config.family.qkv_bias:
        return project(h, weights["qkv"], leaves, groups=groups)
    root = project(h, weights["qkv"], leaves, groups=groups, out_dtype=torch.float32)
    return add_bias(root, weights["qkv_bias"], h.dtype, groups=groups)
