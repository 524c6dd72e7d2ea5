"""Every op against the order written out in `order_oracle`, to the bit. CPU only: a leaf of a GPU is a chain of 16-wide
steps, which has an oracle of its own."""

import ctypes
from itertools import pairwise

import numpy as np
import pytest
import torch

from kernels.ops import (
    attention,
    embedding,
    fold_rows,
    gumbel_argmax,
    linear_logprob,
    matmul,
    norm_rope,
    rms_norm,
    rope_table,
    square_rows,
    sum_rows,
    swiglu,
    vocab_logprob,
    vocab_nodes,
)
from kernels.ops.adamw import adamw
from kernels.ops.attention.cpu import forward as attention_forward
from kernels.ops.attention.spec import packed
from kernels.ops.matmul import input_gradient, weight_gradient
from kernels.ops.sample.cpu import noise_words
from kernels.spec import spread
from tests.bits import assert_same_bits
from tests.kernels import order_oracle as oracle
from tests.kernels.order_oracle import F4

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0, octaves: int = 3) -> torch.Tensor:
    return spread(shape, torch.Generator().manual_seed(seed), CPU, torch.float32, octaves)


def offsets(*sizes: int) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(sizes)])


def same(actual: torch.Tensor, expected: np.ndarray, what: str = "") -> None:
    __tracebackhide__ = True
    assert_same_bits(actual, torch.from_numpy(np.array(expected)), what)


# Group sizes: uneven, empty ones first, inside and last, counts that are no power of two.
GROUPS = [
    (9,),
    (4, 5),
    (3, 0, 7),
    (1, 2, 3, 4),
    (0, 5, 1, 0, 6),
    (2, 9, 1, 1, 3, 0),
    (5, 1, 1, 1, 4, 2, 7),
    (3,) * 8,
    (2,) * 11,
    (1, 4) * 6 + (3,),
]


def test_the_oracle_fma_is_the_one_of_libm() -> None:
    libm = ctypes.CDLL("libm.so.6")
    libm.fmaf.restype, libm.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(20000).astype(F4) for _ in range(2))
    c = rng.standard_normal(20000).astype(F4)
    c[::4] = -(a * b)[::4]  # all but the last bits cancel
    a[1::8], c[1::8] = F4(1) + F4(2.0**-23), F4(2.0**-24)  # ties, and what breaks them
    b[2::8], c[2::8] = F4(2.0**-100), c[2::8] * F4(2.0**-140)  # subnormal sums
    a[3::8] = a[3::8] * F4(2.0**-80)
    b[3::8] = b[3::8] * F4(-(2.0**-80))
    c[3::8] = 0  # a product that vanishes keeps its sign
    same(torch.from_numpy(oracle.fma(a, b, c)), np.array([libm.fmaf(*t) for t in zip(a, b, c, strict=True)], F4))


def test_the_oracle_fma_is_not_a_product_and_a_sum() -> None:
    a, b, c = (normal(1000, seed=s).numpy() for s in range(3))
    double_rounded = (a.astype("f8") * b + c).astype(F4)
    assert (oracle.fma(a, b, c) != a * b + c).any() and np.isclose(oracle.fma(a, b, c), double_rounded).all()


# Matmul ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("M", "N", "leaf"), [(1, 3, 1), (5, 40, 7), (33, 19, 16), (50, 25, 3)])
def test_matmul(M: int, N: int, leaf: int, leaves: int) -> None:
    x, w = normal(M, leaf * leaves), normal(N, leaf * leaves, seed=1)
    same(matmul(x, w, leaves), oracle.contract(x.numpy(), w.numpy(), range(0, leaf * leaves + 1, leaf)))


def test_matmul_in_bfloat16_rounds_once_at_the_root() -> None:
    x, w = normal(9, 64).bfloat16(), normal(13, 64, seed=1).bfloat16()
    exact = oracle.contract(x.float().numpy(), w.float().numpy(), range(0, 65, 16))
    same(matmul(x, w, 4, out_dtype=torch.float32), exact)
    assert_same_bits(matmul(x, w, 4), torch.from_numpy(exact).bfloat16())


def test_input_gradient() -> None:
    dy, w = normal(21, 24), normal(24, 35, seed=1)
    same(input_gradient(dy, w, 8), oracle.contract(dy.numpy(), w.numpy().T, range(0, 25, 3)))
    x = normal(21, 40).requires_grad_()
    w = normal(24, 40, seed=1)
    (dx,) = torch.autograd.grad(matmul(x, w, 8), x, dy)
    same(dx, oracle.contract(dy.numpy(), w.numpy().T, range(0, 25, 3)), "autograd")


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_weight_gradient(sizes: tuple[int, ...]) -> None:
    at = offsets(*sizes)
    dy, x = normal(int(at[-1]), 19), normal(int(at[-1]), 40, seed=1)
    expected = oracle.contract(dy.numpy().T, x.numpy().T, at.tolist())
    same(weight_gradient(dy, x, at), expected)
    w = normal(19, 40, seed=2).requires_grad_()
    (dw,) = torch.autograd.grad(matmul(x, w, 1, groups=at), w, dy)
    same(dw, expected, "autograd")


# Sums over rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_sum_rows(sizes: tuple[int, ...]) -> None:
    at = offsets(*sizes)
    x = normal(int(at[-1]), 37)
    leaves = []
    for low, high in pairwise(at.tolist()):
        leaf = np.zeros(37, F4)
        for row in x.numpy()[low:high]:
            leaf = leaf + row
        leaves.append(leaf)
    same(sum_rows(x, at), oracle.tree(leaves))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 11, 16])
def test_fold_rows(rows: int) -> None:
    x = normal(rows, 5)
    same(fold_rows(x), oracle.tree(list(x.numpy())))


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_embedding_gradient(sizes: tuple[int, ...]) -> None:
    at = offsets(*sizes)
    tokens = int(at[-1])
    dy, ids = normal(tokens, 21), torch.randint(0, 4, (tokens,), generator=torch.Generator().manual_seed(1))
    ids[0] = 5  # an id of one token, one that never comes, and ids that miss whole groups
    leaves = np.zeros((len(sizes), 7, 21), F4)
    for g, (low, high) in enumerate(pairwise(at.tolist())):
        for t in range(low, high):
            leaves[g, ids[t]] = leaves[g, ids[t]] + dy.numpy()[t]
    weight = normal(7, 21, seed=2).requires_grad_()
    (dw,) = torch.autograd.grad(embedding(ids, weight, groups=at), weight, dy)
    same(dw, oracle.tree(list(leaves)))


def test_embedding_never_gives_minus_zero() -> None:
    """Neither from a weight of -0 nor from one that bfloat16 rounds to -0: a tree over shards adds +0 to it."""
    weight = torch.tensor([[-0.0, -(2.0**-140), 1.0]])
    assert torch.tensor(-(2.0**-140)).bfloat16().signbit()
    for out_dtype in (torch.float32, torch.bfloat16):
        y = embedding(torch.tensor([0, 0]), weight, out_dtype=out_dtype)
        assert_same_bits(y, (weight.to(out_dtype) + 0.0).expand(2, 3), str(out_dtype))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 100])
def test_row_order(n: int) -> None:
    x, weight = normal(9, n), normal(n, seed=1)
    a, w = x.numpy(), weight.numpy()
    same(square_rows(x), oracle.row_dot(a, a))
    inverse = F4(1) / np.sqrt(oracle.row_dot(a, a) / F4(n) + F4(1e-6))[:, None]
    same(rms_norm(x, weight, 1e-6), a * inverse * w)


def test_rms_norm_gradient() -> None:
    at = offsets(3, 0, 4, 2, 1)
    x, weight, dy = normal(10, 2, 33).requires_grad_(), normal(33, seed=1).requires_grad_(), normal(10, 2, 33, seed=2)
    dx, dw = torch.autograd.grad(rms_norm(x, weight, 1e-6, groups=at), (x, weight), dy)
    a, w, g = x.detach().numpy(), weight.detach().numpy(), dy.numpy()
    inverse = F4(1) / np.sqrt(oracle.row_dot(a, a) / F4(33) + F4(1e-6))[..., None]
    of_weight = g * (a * inverse)
    mean = oracle.row_dot(of_weight, np.broadcast_to(w, a.shape))[..., None] / F4(33)
    same(dx, inverse * oracle.fma(-(a * inverse), mean, g * w))
    rows, leaves = of_weight.reshape(20, 33), []
    for low, high in pairwise(at.tolist()):
        leaf = np.zeros(33, F4)
        for row in rows[2 * low : 2 * high]:
            leaf = leaf + row
        leaves.append(leaf)
    same(dw, oracle.tree(leaves))


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 64, 127, 128, 129, 256, 511, 512, 513, 640, 1024, 1030])
@pytest.mark.parametrize("D", [32, 48])
def test_attention_row(D: int, length: int) -> None:
    scale = D**-0.5
    q, k, v = normal(length, 2, D, octaves=1), normal(length, 1, D, seed=1, octaves=1), normal(length, 1, D, seed=2)
    out, lse = attention_forward(q, k, v, packed(torch.tensor([length]), CPU), scale)
    fused = F4(scale * np.log2(np.e))
    for t in {0, length // 2, *range(max(0, length - 5), length)}:
        for h in (0, 1):
            row, end = oracle.attention_row(q[t, h].numpy(), k[: t + 1, 0].numpy(), v[: t + 1, 0].numpy(), fused)
            same(out[t, h], row, f"query {t} head {h}")
            same(lse[t, h], end, f"log-sum-exp of query {t} head {h}")


# Rows of a tile: 64, of keys: 16. Sequences that end inside one; heads of a kv head that a tile cannot hold.
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads"), [((6, 1, 9), 4, 2), ((23, 17), 3, 1), ((16, 33), 1, 1), ((4,), 70, 1)]
)
def test_attention_gradient(lengths: tuple[int, ...], heads: int, kv_heads: int) -> None:
    D, scale, group = 16, 0.3, heads // kv_heads
    tokens, pages = sum(lengths), packed(torch.tensor(lengths), CPU)
    q, d_out = normal(tokens, heads, D, octaves=1).requires_grad_(), normal(tokens, heads, D, seed=9)
    k, v = (normal(tokens, kv_heads, D, seed=s, octaves=1).requires_grad_() for s in (3, 4))
    out = attention(q, k, v, pages, scale)
    d_q, d_k, d_v = torch.autograd.grad(out, (q, k, v), d_out)
    Q, K, V, out, G = (t.detach().numpy() for t in (q, k, v, out, d_out))
    fused, first = F4(scale * np.log2(np.e)), 0
    for n in lengths:
        at = slice(first, first + n)
        for kv in range(kv_heads):
            h = slice(group * kv, group * (kv + 1))
            rows = [
                [oracle.attention_row(Q[first + t, g], K[at, kv][: t + 1], V[at, kv][: t + 1], fused) for t in range(n)]
                for g in range(heads)[h]
            ]
            for g, heads_rows in zip(range(heads)[h], rows, strict=True):
                same(torch.from_numpy(out[at, g].copy()), np.array([row for row, _ in heads_rows]), f"head {g}")
            lse = np.array([[end for _, end in heads_rows] for heads_rows in rows], F4).T
            expected = oracle.attention_gradient(Q[at, h], K[at, kv], V[at, kv], out[at, h], lse, G[at, h], scale)
            for actual, gradient, name in zip((d_q[at, h], d_k[at, kv], d_v[at, kv]), expected, "qkv", strict=True):
                same(actual, gradient, f"d_{name} of a sequence of {n}, kv head {kv}")
        first += n


# Vocabulary -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("width", [1, 16, 23])
def test_log_sum_exp_tree(leaves: int, width: int) -> None:
    logits, temperature = normal(6, leaves * width, octaves=4), torch.tensor([1.0, 0.7, 1.5, 2.0, 0.3, 1.1])
    t = temperature.numpy()
    z = logits.numpy() / t[:, None]
    root = oracle.tree([oracle.vocab_leaf(z[:, i * width : (i + 1) * width]) for i in range(leaves)])
    picked = logits[:, leaves * width // 2].contiguous()
    logprob, lse = vocab_logprob(vocab_nodes(logits, temperature, leaves), picked, temperature)
    same(lse, root.m + oracle.log(root.s))
    same(logprob, (picked.numpy() / t - root.m) - oracle.log(root.s))


def test_linear_logprob_gradient() -> None:
    at, leaves = offsets(4, 0, 3, 5, 2), 4
    x, head = normal(14, 20, octaves=1).requires_grad_(), (normal(24, 20, seed=1, octaves=1) / 4).requires_grad_()
    targets = torch.randint(0, 24, (14,), generator=torch.Generator().manual_seed(3))
    temperature, d = torch.linspace(0.5, 2, 14), normal(14, seed=4)
    logprob = linear_logprob(x, head, targets, temperature, leaves, at)
    dx, d_head = torch.autograd.grad(logprob, (x, head), d)
    X, W, t = x.detach().numpy(), head.detach().numpy(), temperature.numpy()[:, None]
    logits = oracle.contract(X, W, range(0, 21, 5))
    z, own = logits / t, (np.arange(14), targets.numpy())
    root = oracle.tree([oracle.vocab_leaf(z[:, i : i + 6]) for i in range(0, 24, 6)])
    same(logprob.detach(), (z[own] - root.m) - oracle.log(root.s))
    p, g = oracle.exp(z - (root.m + oracle.log(root.s))[:, None]), d.numpy()[:, None] / t
    d_logits = -(g * p)
    d_logits[own] = g[:, 0] * (F4(1) - p[own])
    same(dx, oracle.contract(d_logits, W.T, range(0, 25, 6)))
    same(d_head, oracle.contract(d_logits.T, X.T, at.tolist()))


# Elementwise ----------------------------------------------------------------------------------------------------------


def test_swiglu() -> None:
    x, dy = normal(7, 66, octaves=5).requires_grad_(), normal(7, 33, seed=1)
    y = swiglu(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    gate, up, g, one = x.detach().numpy()[:, :33], x.detach().numpy()[:, 33:], dy.numpy(), F4(1)
    same(y.detach(), gate / (one + oracle.exp(-gate)) * up)
    sigma = one / (one + oracle.exp(-gate))
    same(dx[:, 33:], g * (gate * sigma), "d up")
    same(dx[:, :33], g * up * sigma * oracle.fma(gate, one - sigma, one), "d gate")


def test_rope() -> None:
    cosine, sine = rope_table(50, 6, 10000.0)
    x, positions = normal(9, 2, 6).requires_grad_(), torch.randint(0, 50, (9,), dtype=torch.int32)
    c, s = (t[positions].numpy()[:, None] for t in (cosine, sine))
    a, b = x.detach().numpy()[..., :3], x.detach().numpy()[..., 3:]
    y = torch.cat(norm_rope(x, None, 0.0, (cosine, sine), positions, 1), 1)
    same(y.detach(), np.concatenate([oracle.fma(a, c, -(b * s)), oracle.fma(b, c, a * s)], -1))
    (dx,) = torch.autograd.grad(y, x, x.detach())
    same(dx, np.concatenate([oracle.fma(a, c, b * s), oracle.fma(b, c, -(a * s))], -1), "gradient")


def test_adamw() -> None:
    weight, grad, first, second = (normal(40, seed=s) for s in range(4))
    second = second.square()
    w, g, m, v = (t.numpy().copy() for t in (weight, grad, first, second))
    adamw(weight, grad, first, second, step=3, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, grad_scale=0.37)
    lr, b1, b2, one, g = F4(1e-2), F4(0.9), F4(0.95), F4(1), g * F4(0.37)
    m = oracle.fma(b1, m, (one - b1) * g)
    v = oracle.fma(b2, v, (one - b2) * (g * g))
    step = (m / F4(1 - 0.9**3)) / (np.sqrt(v / F4(1 - 0.95**3)) + F4(1e-8))
    same(first, m), same(second, v), same(weight, oracle.fma(-lr, step, w * (one - lr * F4(0.1))))


# Sampling -------------------------------------------------------------------------------------------------------------

_ALL = 0xFFFFFFFF
RANDOM123 = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([_ALL] * 4, [_ALL] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), RANDOM123)
def test_the_oracle_philox_has_the_published_vectors(counter: list[int], key: list[int], words: list[int]) -> None:
    assert oracle.philox4x32(counter, key) == words


def expected_words(seed: int, position: int, ids: int) -> list[int]:
    key = [seed & _ALL, seed >> 32 & _ALL]
    counter = [position & _ALL, position >> 32 & _ALL, 0]
    return [oracle.philox4x32([v // 4, *counter], key)[v % 4] for v in range(ids)]


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 2), (-1, 7), (-(2**63), 2**40 + 3), (2**63 - 1, 2**63 - 1)])
@pytest.mark.parametrize("ids", [1, 4, 5, 22])
def test_philox(seed: int, position: int, ids: int) -> None:
    assert [w & _ALL for w in noise_words(seed, position, ids).tolist()] == expected_words(seed, position, ids)


def test_the_first_words_are_the_published_ones() -> None:
    assert [w & _ALL for w in noise_words(0, 0, 4).tolist()] == RANDOM123[0][2]


def test_the_smallest_words_keep_their_precision() -> None:
    """One word in 2^24 is below 256: this one is 195."""
    word = oracle.philox4x32([2853482 // 4, 3, 0, 0], [0, 0])[2853482 % 4]
    assert word == 195
    logits = torch.full((1, 4), -torch.inf)
    logits[0, 2853482 % 4] = 0.0
    where = torch.tensor([0]), torch.tensor([3]), torch.zeros(1, dtype=torch.uint8)
    score, token, _ = gumbel_argmax(logits, torch.ones(1), *where, 2853482 // 4 * 4)
    assert token.tolist() == [2853482]
    same(score[0], oracle.gumbel(word))


def test_scores() -> None:
    logits, temperature = normal(5, 30), torch.tensor([0.5, 1.0, 0.7, 1.3, 2.0])
    seeds, positions = torch.tensor([3, -9, 2**62, 0, 5]), torch.tensor([0, 1, 2**35, 4, 2])
    greedy = torch.tensor([0, 0, 0, 1, 0], dtype=torch.uint8)
    score, ids, picked = gumbel_argmax(logits, temperature, seeds, positions, greedy)
    for r in range(5):
        expected = logits[r].numpy() / temperature.numpy()[r]
        if not greedy[r]:
            noise = [oracle.gumbel(w) for w in expected_words(int(seeds[r]), int(positions[r]), 30)]
            expected = np.array([z + g for z, g in zip(expected, noise, strict=True)], F4)
        best = int(expected.argmax())
        assert int(ids[r]) == best
        same(score[r], expected[best]), same(picked[r], logits.numpy()[r, best])


def test_what_cannot_be_drawn() -> None:
    """A NaN or -inf logit never wins, the lowest id wins a tie, and a row without a number has id -1."""
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [[nan, 1.0, 3.0, 3.0, nan], [-inf, -inf, -7.0, -inf, nan], [nan, -inf, nan, nan, -inf], [2.0] * 5]
    )
    rows = torch.zeros(4, dtype=torch.int64)
    for greedy, ids in ((1, [2, 2, -1, 0]), (0, [None, 2, -1, None])):
        flags = torch.full((4,), greedy, dtype=torch.uint8)
        _, drawn, picked = gumbel_argmax(logits, torch.ones(4), rows, rows, flags)
        for got, want in zip(drawn.tolist(), ids, strict=True):
            assert want is None or got == want
        assert drawn[0] in (1, 2, 3) and picked[1] == -7.0


def test_a_leaf_of_tokens_that_may_not_be_drawn() -> None:
    """All its logits are -inf: it adds nothing, and a log-prob has the bits of the vocabulary without it."""
    logits, temperature = normal(5, 64), torch.rand(5) + 0.5
    logits[:, 16:48] = -torch.inf
    nodes = vocab_nodes(logits, temperature, 4)
    assert (nodes[:, 1:3] == torch.tensor([-torch.inf, 0.0])).all()
    without = vocab_nodes(torch.cat([logits[:, :16], logits[:, 48:]], 1), temperature, 2)
    for a, b in zip(
        vocab_logprob(nodes, logits[:, 3].contiguous(), temperature),
        vocab_logprob(without, logits[:, 3].contiguous(), temperature),
        strict=True,
    ):
        assert_same_bits(a, b)
