"""A mixture of experts in the model: what its config may say, and that no routing of tokens changes a bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.collectives import TreeGroup
from kernels.model import ConfigError, Layout, ModelConfig, decoder_layer, layer_weights, position_table, served
from kernels.model.experts import Experts
from kernels.tree import Shard
from tests.alignment.threads import run_threads
from tests.bits import assert_same_bits
from tests.model.hugging_face import reference
from tests.model.shapes import EIGHT, SHAPES, prompts, random_weights

MIXED = replace(EIGHT, model_type="qwen3_moe", layers=1, experts=Experts(16, 3, 16, True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 must be from 1 to num_experts=8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; it must be a positive integer"),
        ({"num_experts": 2**40}, "num_experts is 1099511627776; it must be at most 4096"),
        ({"num_experts": True}, "num_experts is True; it must be a positive integer"),
        ({"num_experts": 7, "num_experts_per_tok": 2}, "num_experts 7 is not divisible by model.leaves=2"),
        ({"num_local_experts": 16}, "num_experts is 8; it must be num_local_experts=16"),
        ({"moe_intermediate_size": 20}, "moe_intermediate_size=20 must be a multiple of 8"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'; it must be true or false"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers is 'all'; it must be a list of layers"),
        ({"mlp_only_layers": [0, 1]}, "mlp_only_layers=[0, 1] leave no expert in 2 layers"),
        ({"decoder_sparse_step": 3}, "decoder_sparse_step=3 and mlp_only_layers=[] leave no expert in 2 layers"),
        ({"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size is 24; it is of another mixture"),
        ({"n_group": 4}, "n_group is 4; it is of another mixture of experts; supported are models of type qwen3_moe"),
        ({"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' is not supported; supported: qwen3, qwen3_moe"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config={'quant_method': 'fp8'} is not"),
        ({"model_type": "qwen3"}, "num_experts is 8; it is not understood"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    fields = SHAPES["experts"].to_hf() | changes
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(fields, 2)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_other_name_of_the_number_of_experts() -> None:
    fields = SHAPES["experts"].to_hf()
    fields["num_local_experts"] = fields.pop("num_experts")
    assert ModelConfig.from_hf(fields, 2) == SHAPES["experts"]


def test_ranks_that_do_not_divide_the_experts() -> None:
    with pytest.raises(ConfigError, match=r"num_experts 12 is not divisible by model\.leaves=8: .* at most 4 leaves"):
        replace(MIXED, experts=Experts(12, 3, 16))
    with pytest.raises(ConfigError, match=r"rollout\.tp=16 is more than model\.leaves=8"):
        MIXED.check_shards(16)


def test_which_layers_are_sparse() -> None:
    made = replace(MIXED, layers=6, experts=Experts(16, 3, 16, step=2, dense=(3,)))
    assert [made.sparse(i) for i in range(6)] == [False, True, False, False, False, True]
    assert ModelConfig.from_hf(made.to_hf(), made.leaves) == made


# Routing --------------------------------------------------------------------------------------------------------------


def layer(
    config: ModelConfig, group: TreeGroup, weights: dict[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what layer 0 adds to x, the experts of each token) on one rank of `group`."""
    mine = {p.name: p.shard(weights[p.name], group.shard) for p in served(config)}
    told: list[torch.Tensor] = []
    layout, table = Layout.packed([len(x)], [1]), position_table(config)
    given = (layer_weights(mine, 0), 0, x, None, layout, None, table)
    _, delta = decoder_layer(config, group, *given, routed=lambda _, ids, logits, share: told.append(ids) or share)
    assert isinstance(delta, torch.Tensor)
    return delta.detach(), told[0]


def crowded(kind: str, weights: dict[str, torch.Tensor]) -> None:
    """Sets the router so that tokens choose in an unusual way."""
    router = weights["layers.0.router"]
    if kind == "nearly all choose the same":
        router[:3] = 100.0
        router[2] *= -1
    elif kind == "ties":
        router[:] = router[0]
    elif kind == "pairs of ties":
        router[8:] = router[:8]


@pytest.mark.parametrize("kind", ["as it comes", "nearly all choose the same", "ties", "pairs of ties"])
def test_no_number_of_ranks_changes_a_bit(kind: str) -> None:
    """Among the cases: all of a token's experts on one rank, ranks without a token, experts that get every token or none."""
    weights = {p.name: w for p, w in random_weights(MIXED)}
    crowded(kind, weights)
    x = torch.randn(23, MIXED.hidden_size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected, ids = layer(MIXED, TreeGroup(), weights, x)
        for size in (2, 4, 8):
            for delta, chosen in run_threads(size, lambda group: layer(MIXED, group, weights, x)):
                assert_same_bits(chosen, ids, f"{kind}, experts on {size} ranks")
                assert_same_bits(delta, expected, f"{kind}, {size} ranks")
    trained, same = layer(MIXED, TreeGroup(), {n: w.requires_grad_() for n, w in weights.items()}, x)
    assert_same_bits(same, ids, f"{kind}, experts in training")
    assert_same_bits(trained, expected, f"{kind}, training")
    held = torch.bincount(ids.flatten().long(), minlength=16)
    if kind == "ties":
        assert (ids == torch.tensor([0, 1, 2])).all() and held[3:].sum() == 0
    if kind == "nearly all choose the same":
        assert held.max() > 20 and held.min() == 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(count=st.sampled_from([8, 16, 24]), chosen=st.integers(1, 8), normalize=st.booleans(), tokens=st.integers(1, 40))
def test_a_token_alone(count: int, chosen: int, normalize: bool, tokens: int) -> None:
    """Its experts and its sum do not depend on the company it keeps, nor on fresh memory."""
    config = replace(MIXED, experts=Experts(count, chosen, 8, normalize))
    weights = {p.name: w for p, w in random_weights(config, tokens)}
    weights = {n: w for n, w in weights.items() if n.startswith("layers.0.") or n in ("embed", "norm", "head")}
    x = torch.randn(tokens, config.hidden_size, generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        # the same position, hence the same attention: every token is the first of its sequence
        layout, table = Layout.packed([1] * tokens, [tokens]), position_table(config)
        told: list[torch.Tensor] = []
        run = (config, TreeGroup(), layer_weights(weights, 0), 0)
        rest = {"routed": lambda _, ids, logits, share: told.append(ids) or share}
        _, together = decoder_layer(*run, x, None, layout, None, table, **rest)  # type: ignore[arg-type]
        for i in range(0, tokens, 7):
            one = Layout.packed([1], [1])
            _, alone = decoder_layer(*run, x[i : i + 1], None, one, None, table, **rest)  # type: ignore[arg-type]
            assert_same_bits(told[-1], told[0][i : i + 1], f"experts of token {i}")
            assert_same_bits(alone, together[i : i + 1], f"token {i}")


def test_an_expert_that_no_token_chooses_has_no_gradient() -> None:
    weights = {p.name: w for p, w in random_weights(MIXED)}
    crowded("ties", weights)
    x = torch.randn(9, MIXED.hidden_size, generator=torch.Generator().manual_seed(4))
    held = {n: w.requires_grad_() for n, w in weights.items()}
    delta, _ = layer(MIXED, TreeGroup(), held, x)
    mine = {p.name: p.shard(held[p.name], Shard(0, 1)) for p in served(MIXED)}
    layout, table = Layout.packed([9], [1]), position_table(MIXED)
    _, delta = decoder_layer(MIXED, TreeGroup(), layer_weights(mine, 0), 0, x, None, layout, None, table)
    delta.sum().backward()
    for name in ("experts_gate_up", "experts_down"):
        gradient = held[f"layers.0.{name}"].grad
        assert gradient is not None
        each = gradient.view(16, -1)
        assert each[:3].any() and not each[3:].view(torch.int32).any(), "not +0"


# transformers ---------------------------------------------------------------------------------------------------------


def test_the_experts_are_those_of_transformers() -> None:
    """Where two logits are within rounding of each other the choice may differ: such tokens are counted and shown."""
    config = SHAPES["experts, dense layers"]
    weights, (ids,) = {p.name: w for p, w in random_weights(config)}, prompts(config, (90,))
    hf, theirs, mine = reference(config, weights), {}, {}
    for i in filter(config.sparse, range(config.layers)):
        gate = hf.model.layers[i].mlp.gate
        gate.register_forward_hook(lambda _, __, out, i=i: theirs.__setitem__(i, (out[0], out[2])))
    with torch.no_grad():
        hf(torch.tensor([ids]))
        layout, table = Layout.packed([len(ids)], [1]), position_table(config)
        x, delta = weights["embed"][ids], None
        for i in range(config.layers):
            given = (layer_weights(weights, i), i, x, delta, layout, None, table)
            x, delta = decoder_layer(
                config, TreeGroup(), *given, routed=lambda i, e, _, share: mine.__setitem__(i, e) or share
            )
    differ = []
    for i, (logits, chosen) in theirs.items():
        for t in (chosen.sort(1).values != mine[i]).any(1).nonzero().flatten().tolist():
            ordered = logits[t].sort(descending=True).values
            gap = float(ordered[config.experts.chosen - 1] - ordered[config.experts.chosen])  # type: ignore[union-attr]
            differ.append((i, t, gap))
            assert gap < 64 * torch.finfo(torch.float32).eps * float(logits[t].abs().max()), differ
    print(f"{len(differ)} of {2 * len(ids)} choices differ, all within rounding: {differ}")
    assert len(differ) <= 2
