import pytest
import torch

from kernels.ops.attention import Pages, attention, hopper
from kernels.ops.attention.hopper import packed as packed_kernel
from kernels.ops.attention.hopper import packed_gradient
from kernels.ops.attention.portable import decode, gradient, prefill
from kernels.tree import KEY_BLOCK, KEY_SPLIT
from tests.bits import assert_same_bits
from tests.kernels.gpu.accuracy import relative_error

pytestmark = pytest.mark.gpu
bf16 = torch.bfloat16
C = 128**-0.5 * 1.4426950408889634


def packed(lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(int(starts[-1])) - starts[sequence]
    table = (starts[:-1, None] + torch.arange(max(lengths))).clamp(max=int(starts[-1]) - 1)
    return Pages(table.int().cuda(), 1, sequence.int().cuda(), position.int().cuda(), starts.cuda(), True)


def inputs(T, heads=8, kv_heads=2, D=128):
    return [torch.randn(T, h, D, device="cuda").to(bf16) for h in (heads, kv_heads, kv_heads)]


def paged(k, v, lengths, spans, size):
    """The keys of `packed` sequences scattered over shuffled pages, NaN elsewhere, seen by the queries of `spans`."""
    need = [-(-n // size) for n in lengths]
    order = torch.randperm(sum(need) + 3)[: sum(need)].tolist()
    table = torch.zeros(len(lengths), max(need), dtype=torch.int32)
    kc, vc = (torch.full(((sum(need) + 3) * size, *t.shape[1:]), torch.nan, device="cuda", dtype=bf16) for t in (k, v))
    at = 0
    for s, n in enumerate(lengths):
        table[s, : need[s]] = torch.tensor(order[: need[s]], dtype=torch.int32)
        order = order[need[s] :]
        p = torch.arange(n)
        rows = (table[s, p // size].long() * size + p % size).cuda()
        kc[rows], vc[rows] = k[at : at + n], v[at : at + n]
        at += n
    count = torch.tensor([b - a for a, b in spans])
    sequence = torch.repeat_interleave(torch.arange(len(spans)), count)
    position = torch.cat([torch.arange(a, b) for a, b in spans])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    return kc, vc, Pages(table.cuda(), size, sequence.int().cuda(), position.int().cuda(), starts.cuda())


LENGTHS = [1, 63, 700, 64, 65, 1300, 129, 512, 513, 127, 128]


def reference(q, k, v, pages):
    """One warp, 16 rows, no pipeline."""
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device="cuda")
    prefill.launch(q, k, v, pages, out, lse, C, KEY_BLOCK, KEY_SPLIT, rows=16, warps=1, stages=1)
    return out, lse


def test_accuracy():
    lengths = [300, 1100]
    q, k, v = inputs(1400)
    out, lse = hopper.forward(q, k, v, packed(lengths), 128**-0.5)
    at = 0
    for n in lengths:
        s = slice(at, at + n)
        Q, K, V = (t[s].transpose(0, 1).double() for t in (q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)))
        S = (Q @ K.transpose(1, 2) * 128**-0.5).masked_fill(torch.ones(n, n, device="cuda").triu(1).bool(), -torch.inf)
        want = (S.softmax(-1) @ V).transpose(0, 1)
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(t[s].transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        print(f"ours {relative_error(out[s], want):.3e}, vendor {relative_error(theirs, want):.3e}")
        assert relative_error(out[s], want) <= 1.02 * relative_error(theirs, want)
        assert relative_error(lse[s], S.logsumexp(-1).T / 0.6931471805599453) < 1e-6
        at += n


@pytest.mark.parametrize(
    "rows,warps,stages", [(128, 8, 2), (64, 4, 2), (64, 4, 3), (128, 8, 3), (16, 4, 2), (128, 4, 2)]
)
def test_tiles(rows, warps, stages):
    q, k, v = inputs(sum(LENGTHS))
    pages = packed(LENGTHS)
    want = reference(q, k, v, pages)
    out, lse = torch.empty_like(want[0]), torch.empty_like(want[1])
    prefill.launch(q, k, v, pages, out, lse, C, KEY_BLOCK, KEY_SPLIT, rows=rows, warps=warps, stages=stages)
    assert_same_bits(out, want[0], "out")
    assert_same_bits(lse, want[1], "lse")


@pytest.mark.parametrize(
    "heads,kv_heads,D,lengths",
    [(8, 2, 128, LENGTHS), (16, 8, 128, [2500]), (4, 4, 64, LENGTHS), (32, 8, 128, [128, 1, 1, 1024, 77])],
)
def test_packed_by_tma(heads, kv_heads, D, lengths):
    q, k, v = inputs(sum(lengths), heads, kv_heads, D)
    pages = packed(lengths)
    want = reference(q, k, v, pages)
    for blocks in (132, 5):
        out, lse = torch.full_like(want[0], torch.nan), torch.full_like(want[1], torch.nan)
        packed_kernel.launch(q, k, v, pages, out, lse, C, KEY_SPLIT, blocks=blocks)
        assert_same_bits(out, want[0], "out")
        assert_same_bits(lse, want[1], "lse")


@pytest.mark.parametrize(
    "lengths", [[100, 640, 129, 1, 1153, 128, 63], [3000, 511, 65], [i % 3 + 1 for i in range(300)]]
)
def test_packed_neighbours(lengths):
    """A sequence alone, and beside sequences of NaN, before and after it; its last block may lie half in a neighbour."""
    q, k, v = inputs(sum(lengths))
    out, lse = hopper.forward(q, k, v, packed(lengths), 128**-0.5)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    for parity in (0, 1):
        mine = owner % 2 == parity
        broken = [torch.where(mine[:, None, None], t, torch.nan) for t in (q, k, v)]
        beside, e = hopper.forward(*broken, packed(lengths), 128**-0.5)
        assert_same_bits(beside[mine], out[mine], "beside NaN")
        assert_same_bits(e[mine], lse[mine], "lse beside NaN")
    for s in range(min(len(lengths), 7)):
        alone, e = hopper.forward(*(t[owner == s] for t in (q, k, v)), packed(lengths[s : s + 1]), 128**-0.5)
        assert_same_bits(alone, out[owner == s], f"sequence {s} alone")
        assert_same_bits(e, lse[owner == s], f"lse of sequence {s} alone")


@pytest.mark.parametrize("size,D", [(s, 128) for s in (1, 8, 16, 32, 64, 128, 256, 96)] + [(16, 64), (128, 64)])
def test_pages_chunks_and_decode(size, D):
    q, k, v = inputs(sum(LENGTHS), D=D)
    out, lse = hopper.forward(q, k, v, packed(LENGTHS), 128**-0.5)
    want = reference(q, k, v, packed(LENGTHS))
    assert_same_bits(out, want[0], "packed")
    starts = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    cuts = [
        [(0, n) for n in LENGTHS],
        [(n // 2, n) for n in LENGTHS],
        [(n // 3, max(n // 3 + 1, n - 5)) for n in LENGTHS],
        [(n - 1, n) for n in LENGTHS],
        [(n // 2, n // 2 + 1) for n in LENGTHS],
        [(n - 1 if i % 2 else n // 4, n) for i, n in enumerate(LENGTHS)],
    ]
    for spans in cuts:
        mine = torch.cat([torch.arange(starts[s] + a, starts[s] + b) for s, (a, b) in enumerate(spans)]).cuda()
        kc, vc, pages = paged(k, v, LENGTHS, spans, size)
        got, e = hopper.forward(q[mine], kc, vc, pages, 128**-0.5)
        assert_same_bits(got, out[mine], f"{spans}")
        assert_same_bits(e, lse[mine], f"{spans} lse")


@pytest.mark.parametrize("warps,stages", [(4, 3), (1, 1), (2, 2), (8, 2)])
def test_decode_schedules(warps, stages):
    lengths = [5, 64, 1500, 512, 2049, 513]
    q, k, v = inputs(sum(lengths))
    want, lse = reference(q, k, v, packed(lengths))
    last = torch.tensor(lengths).cumsum(0).cuda() - 1
    for size in (16, 64):
        kc, vc, pages = paged(k, v, lengths, [(n - 1, n) for n in lengths], size)
        out, e = torch.empty_like(q[: len(lengths)]), torch.empty(len(lengths), 8, device="cuda")
        decode.launch(q[last], kc, vc, pages, out, e, C, KEY_BLOCK, KEY_SPLIT, warps=warps, stages=stages)
        assert_same_bits(out, want[last], "out")
        assert_same_bits(e, lse[last], "lse")


def test_other_heads_and_strides():
    for heads, kv_heads, D in ((16, 8, 128), (4, 4, 64), (32, 1, 128), (8, 1, 16)):
        T = 200
        qkv = torch.randn(T, heads + 2 * kv_heads, D, device="cuda").to(bf16)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
        out, _ = hopper.forward(q, k, v, packed([T]), D**-0.5)
        same, _ = hopper.forward(*(t.contiguous() for t in (q, k, v)), packed([T]), D**-0.5)
        assert_same_bits(out, same, f"{heads} {kv_heads} {D}")
        kc, vc, pages = paged(k, v, [T], [(T - 1, T)], 16)
        assert_same_bits(hopper.forward(q[-1:], kc, vc, pages, D**-0.5)[0], out[-1:], f"decode {heads} {kv_heads} {D}")


def gradient_inputs(lengths, heads=8, kv_heads=2, D=128):
    """Arguments of a gradient's launch."""
    q, k, v = inputs(sum(lengths), heads, kv_heads, D)
    pages = packed(lengths)
    out, lse = hopper.forward(q, k, v, pages, D**-0.5)
    return q, k, v, out, lse, torch.randn_like(q), pages.starts, D**-0.5, D**-0.5 * 1.4426950408889634


@pytest.mark.parametrize("D", [16, 64, 128, 256])
def test_backward_accuracy(D):
    lengths = [300, 1, 640, 129]
    q, k, v, _, _, d_out, *_ = gradient_inputs(lengths, D=D)
    mine = [t.clone().requires_grad_() for t in (q, k, v)]
    attention(*mine, packed(lengths), D**-0.5).backward(d_out)
    at = 0
    for n in lengths:
        s = slice(at, at + n)
        at += n
        if n == 1:
            continue
        wide = [t[s].double().requires_grad_() for t in (q, k, v)]
        bf = [t[s].clone().requires_grad_() for t in (q, k, v)]
        S = torch.einsum("thd,shd->hts", wide[0], wide[1].repeat_interleave(4, 1)) * D**-0.5
        S = S.masked_fill(torch.ones(n, n, device="cuda").triu(1).bool(), -torch.inf)
        torch.einsum("hts,shd->thd", S.softmax(-1), wide[2].repeat_interleave(4, 1)).backward(d_out[s].double())
        y = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(0, 1)[None] for t in bf), is_causal=True, enable_gqa=True
        )
        y.backward(d_out[s].transpose(0, 1)[None])
        for name, ours, theirs, want in zip(["q", "k", "v"], mine, bf, wide, strict=True):
            a, b = relative_error(ours.grad[s], want.grad), relative_error(theirs.grad, want.grad)
            print(f"d{name} {n}: ours {a:.3e}, vendor {b:.3e}")
            assert a <= 1.05 * b


BACKWARD = [1, 700, 63, 64, 128, 65, 1300, 127, 129]


@pytest.mark.parametrize("heads,kv_heads,D", [(8, 2, 128), (16, 8, 128), (4, 4, 64), (32, 4, 64)])
def test_backward_schedules(heads, kv_heads, D):
    """The same bits from any number of blocks and in any run: the turns of dq, not time, order its sum."""
    args = gradient_inputs(BACKWARD, heads, kv_heads, D)
    want = packed_gradient.launch(*args)
    for blocks in (132, 17, 3, 1, *[132] * 16):
        for name, got, same in zip(["q", "k", "v"], packed_gradient.launch(*args, blocks=blocks), want, strict=True):
            assert_same_bits(got, same, f"d{name} by {blocks} blocks")


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("lengths", [BACKWARD, [100, 640, 129, 1, 1153, 128, 63], [i % 3 + 1 for i in range(300)]])
def test_backward_neighbours(lengths, D):
    """A sequence alone, and beside sequences of NaN, before and after it; its last tile may lie half in a neighbour."""
    q, k, v, out, lse, d_out, starts, *scales = gradient_inputs(lengths, D=D)
    whole = packed_gradient.launch(q, k, v, out, lse, d_out, starts, *scales)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    for parity in (0, 1):
        mine = owner % 2 == parity
        broken = [t.masked_fill(~mine.view(-1, *[1] * (t.dim() - 1)), torch.nan) for t in (q, k, v, out, lse, d_out)]
        for name, got, want in zip("qkv", packed_gradient.launch(*broken, starts, *scales), whole, strict=True):
            assert_same_bits(got[mine], want[mine], f"d{name} beside NaN")
    for s in range(min(len(lengths), 9)):
        own = [t[owner == s] for t in (q, k, v, out, lse, d_out)]
        alone = packed_gradient.launch(*own, torch.tensor([0, lengths[s]], device="cuda"), *scales)
        for name, got, want in zip("qkv", alone, whole, strict=True):
            assert_same_bits(got, want[owner == s], f"d{name} of sequence {s} alone")


def test_backward_of_strides_and_alignment():
    T = 300
    qkv = torch.randn(T, 12, 128, device="cuda").to(bf16)
    q, k, v = qkv.split((8, 2, 2), 1)
    pages = packed([T])
    out, lse = hopper.forward(q, k, v, pages, 128**-0.5)
    d_out = torch.randn_like(out)
    want = hopper.backward(q.contiguous(), k.contiguous(), v.contiguous(), out, lse, d_out, pages.starts, 128**-0.5)
    odd = torch.empty(q.numel() + 1, device="cuda", dtype=bf16)[1:].view(q.shape).copy_(q)
    for x in (q, odd):
        for name, got, same in zip(
            "qkv", hopper.backward(x, k, v, out, lse, d_out, pages.starts, 128**-0.5), want, strict=True
        ):
            assert_same_bits(got, same, f"d{name}")


def test_backward_of_other_head_dims():
    """The plain kernel, in any tiling."""
    args = gradient_inputs([65, 300, 1, 129], D=32)
    want = hopper.backward(*args[:-1])
    for rows, block, warps, stages in ((64, 64, 4, 1), (128, 64, 8, 1), (64, 32, 4, 2)):
        got = gradient.launch(*args, rows=rows, block=block, warps=warps, stages=stages)
        for name, a, b in zip("qkv", got, want, strict=True):
            assert_same_bits(a, b, f"d{name} {rows} {block}")
