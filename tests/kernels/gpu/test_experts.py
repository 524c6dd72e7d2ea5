"""Rows of experts that stand as they come, sorted, in small tiles and in large ones: the same bits."""

import pytest
import torch

from kernels.ops import combine, dispatch, expert_matmul, gated_experts, route, route_and_dispatch
from kernels.ops.experts import TILE
from kernels.spec import spread
from tests.bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
E, K, H, I, LEAVES = 32, 4, 256, 128, 8


@pytest.mark.parametrize("liked", ["evenly", "one by all", "ties"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 16, 33, 64, 200, 256, 300])
@torch.no_grad()
def test_where_rows_stand_changes_no_bit(tokens: int, liked: str) -> None:
    g = torch.Generator().manual_seed(tokens)
    given = (torch.device("cuda"), torch.bfloat16, 2)
    x, up, down = spread((tokens, H), g, *given), spread((E * 2 * I, H), g, *given), spread((E * H, I), g, *given)
    logits = torch.randn(tokens, E, generator=g).cuda()
    if liked == "one by all":
        logits[:, 7] += 100
    elif liked == "ties":
        logits[:] = 0.5
    ids, share = route(logits, K, True)
    slots = dispatch(ids, 0, E, TILE, torch.tensor([0, tokens], device="cuda"))
    expected = combine(expert_matmul(gated_experts(x, up, slots), down, slots), share, ids, slots, LEAVES)
    for align in (16, 32, 64):
        for ranks in (1, 4):
            parts, mine = [], E // ranks
            for r in range(ranks):
                chosen, weights, made = route_and_dispatch(logits, K, True, r * mine, mine, align)
                assert_same_bits(chosen, ids, f"{tokens} tokens, ids")
                assert_same_bits(weights, share, f"{tokens} tokens, shares")
                z = gated_experts(x, up[r * mine * 2 * I : (r + 1) * mine * 2 * I], made)
                y = expert_matmul(z, down[r * mine * H : (r + 1) * mine * H], made)
                dtype = torch.float32 if ranks > 1 else torch.bfloat16
                parts.append(combine(y, weights, chosen, made, LEAVES // ranks, dtype))
            out = parts[0] if ranks == 1 else ((parts[0] + parts[1]) + (parts[2] + parts[3])).bfloat16()
            assert_same_bits(out, expected, f"{tokens} tokens, align {align}, {ranks} ranks")
