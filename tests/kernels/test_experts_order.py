"""The orders of a mixture of experts, against a second definition of them that shares no code with the kernels."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kernels.ops import combine, dispatch, expert_matmul, gather, route, swiglu
from kernels.ops.experts import STRIPE
from kernels.spec import spread
from tests.bits import assert_same_bits
from tests.kernels import order_oracle as oracle
from tests.kernels.order_oracle import F4

E, H, I, LEAVES, ENDS = 16, 24, 16, 4, [0, 5, 5, 14]
T = ENDS[-1]


def normal(*shape: int, seed: int, octaves: int = 3) -> torch.Tensor:
    return spread(shape, torch.Generator().manual_seed(seed), torch.device("cpu"), torch.float32, octaves)


def same(actual: torch.Tensor, expected: Any, what: str = "") -> None:
    assert_same_bits(actual.detach(), torch.from_numpy(np.ascontiguousarray(expected)), what)


def chosen_of(logits: np.ndarray, k: int) -> list[list[int]]:
    """Sorted by (logit descending, id ascending), then by id."""
    return [sorted(sorted(range(E), key=lambda j: (-row[j], j))[:k]) for row in logits]


def swiglu_of(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / (F4(1) + oracle.exp(-gate)) * up


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 3, E])
def test_a_mixture(k: int, normalize: bool) -> None:
    logits = normal(T, E, seed=1)
    logits[0], logits[1, 3:9] = 0.5, logits[1, 3].item()  # ties
    x, up, down = normal(T, H, seed=2), normal(E * 2 * I, H, seed=3), normal(E * H, I, seed=4)
    d_out = normal(T, H, seed=5)
    given = [t.requires_grad_() for t in (logits, x, up, down)]
    ids, share = route(logits, k, normalize)
    slots = dispatch(ids, 0, E, 1, torch.tensor(ENDS))
    y = expert_matmul(swiglu(expert_matmul(gather(x, slots), up, slots), STRIPE), down, slots)
    out = combine(y, share, ids, slots, LEAVES)
    (of_share,) = torch.autograd.grad(out, share, d_out, retain_graph=True)
    d_logits, d_x, d_up, d_down = torch.autograd.grad(out, given, d_out)

    a, b, c, g = (t.detach().numpy() for t in (x, up, down, d_out))
    expected, shares, chosen = np.zeros((T, H), F4), np.zeros((T, k), F4), chosen_of(logits.detach().numpy(), k)
    dx, dw_up, dw_down = np.zeros((T, H), F4), [], []
    rows: dict[tuple[int, int], Any] = {}  # of token and expert: input of down, gradients of the two products
    for t, row in enumerate(logits.detach().numpy()):
        e = oracle.exp(row - row.max())
        among = np.where(np.isin(range(E), chosen[t]), e, F4(0)) if normalize else e
        shares[t] = e[chosen[t]] / oracle.halves(among)
        leaves = [np.zeros(H, F4) for _ in range(LEAVES)]
        for i, j in enumerate(chosen[t]):
            of_j = b[2 * I * j : 2 * I * (j + 1)].reshape(-1, 2, STRIPE, H)
            gate_w, up_w = of_j[:, 0].reshape(I, H), of_j[:, 1].reshape(I, H)
            gate, linear = (oracle.chain(a[t : t + 1], w, 0, H)[0] for w in (gate_w, up_w))
            z, w_down = swiglu_of(gate, linear), c[H * j : H * (j + 1)]
            v = oracle.chain(z[None], w_down, 0, I)[0]
            leaves[j // (E // LEAVES)] = oracle.fma(shares[t, i], v, leaves[j // (E // LEAVES)])
            same(of_share[t, i : i + 1], oracle.row_dot(v, g[t]), f"d share {t} {j}")
            dv = shares[t, i] * g[t]
            dz = oracle.chain(dv[None], w_down.T, 0, H)[0]
            sigma = F4(1) / (F4(1) + oracle.exp(-gate))
            d_gate = dz * linear * sigma * oracle.fma(gate, F4(1) - sigma, F4(1))
            d_fused = np.stack([d_gate.reshape(-1, STRIPE), (dz * (gate * sigma)).reshape(-1, STRIPE)], 1).reshape(-1)
            rows[t, j] = z, dv, d_fused
            dx[t] = dx[t] + oracle.chain(d_fused[None], b[2 * I * j : 2 * I * (j + 1)].T, 0, 2 * I)[0]
        expected[t] = oracle.tree(leaves)
    same(ids, np.array(chosen, np.int32))
    same(share, shares)
    same(out, expected)
    same(d_x, dx, "d x")
    for j in range(E):
        for into, left, right in ((dw_up, 2, None), (dw_down, 1, 0)):
            nodes = []
            for low, high in pairwise(ENDS):
                mine = [t for t in range(low, high) if j in chosen[t]]
                d = np.array([rows[t, j][left] for t in mine], F4).reshape(
                    len(mine), -1 if mine else (2 * I, H)[left == 1]
                )
                h = np.array([a[t] if right is None else rows[t, j][right] for t in mine], F4)
                h = h.reshape(len(mine), -1 if mine else (H, I)[left == 1])
                nodes.append(oracle.chain(d.T, h.T, 0, len(mine)))
            into.append(oracle.tree(nodes))
    same(d_up, np.concatenate(dw_up), "d gate and up")
    same(d_down, np.concatenate(dw_down), "d down")
    for t, row in enumerate(logits.detach().numpy()):
        e = oracle.exp(row - row.max())
        among = np.where(np.isin(range(E), chosen[t]), e, F4(0)) if normalize else e
        p, g_of = among / oracle.halves(among), np.zeros(E, F4)
        g_of[chosen[t]] = of_share[t].numpy()
        same(d_logits[t], p * (g_of - oracle.halves(p * g_of)), f"d logits of token {t}")
