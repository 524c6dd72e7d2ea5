import pytest
import torch

from kernels.ops import Truncation, exclude_padding
from kernels.ops.logprob import hopper, linear_logprob, vocab_logprob, vocab_nodes
from kernels.ops.matmul import matmul
from kernels.ops.matmul.portable import order
from kernels.tree import leaf_bounds
from tests.bits import assert_same_bits
from tests.kernels.gpu.accuracy import relative_error

pytestmark = pytest.mark.gpu
bf16, f32 = torch.bfloat16, torch.float32


def case(R, n, V):
    x = torch.randn(R, n, device="cuda").to(bf16)
    head = (torch.randn(V, n, device="cuda") * 2 / n**0.5).to(bf16)
    t = torch.rand(R, device="cuda") + 0.5
    return x, head, torch.randint(V, (R,), device="cuda"), t


@pytest.mark.parametrize(
    "R,n,V,leaves",
    [(200, 1024, 8 * 1000, 8), (130, 512, 8 * 1187, 8), (64, 1024, 151936, 8), (70, 512, 4096, 4), (5, 512, 2000, 2)],
)
def test_fused_equals_the_path_over_logits(R, n, V, leaves, monkeypatch):
    x, head, targets, t = case(R, n, V)
    logits = matmul(x, head, leaves, out_dtype=f32)
    assert_same_bits(logits, order.contract(x, head, leaf_bounds(n, leaves)), "logits")
    nodes = vocab_nodes(logits, t, leaves)
    picked = logits.gather(1, targets[:, None])[:, 0]
    want, lse = vocab_logprob(nodes, picked, t)
    for keep in (False, True):
        got, e, kept = hopper.linear(x, head, targets, t, leaves, keep)
        assert_same_bits(got, want, "log-probability")
        assert_same_bits(e, lse, "log-sum-exp")
        assert (kept is not None) == keep
    exact = (logits.double() / t[:, None].double()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    theirs = (logits / t[:, None]).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours, vendor = (got - exact).abs().max(), (theirs - exact).abs().max()
    print(f"max error ours {ours:.2e}, vendor {vendor:.2e}")
    assert ours <= 4e-6
    for rows in (slice(0, 1), slice(2, 5)):  # few rows, as a decode step has them
        few = matmul(x[rows], head, leaves, out_dtype=f32)
        assert_same_bits(vocab_nodes(few, t[rows], leaves), nodes[rows], "nodes of few rows")
    for size in (2, leaves):
        parts = [
            vocab_nodes(matmul(x, head[i * V // size : (i + 1) * V // size], leaves, out_dtype=f32), t, leaves // size)
            for i in range(size)
        ]
        assert_same_bits(torch.cat(parts, 1), nodes, f"{size} vocabulary shards")


@pytest.mark.parametrize("R,n,V,leaves", [(200, 1024, 8 * 1000, 8), (130, 512, 8 * 1187, 8), (70, 512, 4096, 4)])
def test_backward(R, n, V, leaves, monkeypatch):
    x, head, targets, t = case(R, n, V)
    groups = torch.tensor([0, 33, R // 2, R], device="cuda")
    g = torch.randn(R, device="cuda")
    x.requires_grad_(), head.requires_grad_()
    y = linear_logprob(x, head, targets, t, leaves, groups)
    y.backward(g, retain_graph=True)
    for name, first, again in zip(
        ("dx", "dhead"), (x.grad, head.grad), torch.autograd.grad(y, (x, head), g), strict=True
    ):
        assert_same_bits(again, first, f"{name}, a second backward through the same graph")
    spread = [torch.stack([v, v], 1)[:, 0] for v in (targets, t, g)]
    y = linear_logprob(x, head, *spread[:2], leaves, torch.stack([groups, groups], 1)[:, 0])
    for name, first, again in zip(
        ("dx", "dhead"), (x.grad, head.grad), torch.autograd.grad(y, (x, head), spread[2]), strict=True
    ):
        assert_same_bits(again, first, f"{name}, strided vectors")
    some = torch.randperm(R, device="cuda")[: R // 3]
    part = x.detach()[some].requires_grad_()
    linear_logprob(part, head.detach(), targets[some], t[some], leaves).backward(g[some])
    assert_same_bits(part.grad, x.grad[some], "dx of some rows in another order")
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "_fused", lambda *_: False)
        a, b = x.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
        linear_logprob(a, b, targets, t, leaves, groups).backward(g)
    assert_same_bits(x.grad, a.grad, "dx")
    assert_same_bits(head.grad, b.grad, "dhead")
    X, H = x.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    ((X @ H.T) / t[:, None].double()).log_softmax(-1).gather(1, targets[:, None])[:, 0].backward(g.double())
    xb, hb = x.detach().clone().requires_grad_(), head.detach().clone().requires_grad_()
    ((xb @ hb.T).float() / t[:, None]).log_softmax(-1).gather(1, targets[:, None])[:, 0].backward(g)
    for name, ours, theirs, want in (("dx", x, xb, X), ("dhead", head, hb, H)):
        p, q = relative_error(ours.grad, want.grad), relative_error(theirs.grad, want.grad)
        print(f"{name}: ours {p:.3e}, vendor {q:.3e}")
        assert p <= 1.05 * q


def test_a_leaf_of_tokens_that_may_not_be_drawn():
    """All its logits are -inf: it adds nothing, and a log-prob has the bits of the vocabulary without it."""
    logits, temperature = torch.randn(5, 1200, device="cuda"), torch.rand(5, device="cuda") + 0.5
    logits[:, 300:900] = -torch.inf
    nodes = vocab_nodes(logits, temperature, 4)
    assert (nodes[:, 1:3] == torch.tensor([-torch.inf, 0.0], device="cuda")).all()
    without = vocab_nodes(torch.cat([logits[:, :300], logits[:, 900:]], 1), temperature, 2)
    for a, b in zip(*(vocab_logprob(n, logits[:, 3].clone(), temperature) for n in (nodes, without)), strict=True):
        assert_same_bits(a, b, "without the leaf")


@pytest.mark.parametrize(
    "R,n,V,leaves,tokens", [(300, 1024, 8 * 1000, 8, 7991), (64, 512, 64, 8, 37), (9, 512, 4096, 4, 2600)]
)
def test_rows_of_the_head_that_are_no_token(R, n, V, leaves, tokens, monkeypatch):
    """Fused or not they are excluded alike, and have no gradient; whole tiles and whole leaves of them too."""
    x, head, _, t = case(R, n, V)
    targets, g = torch.randint(tokens, (R,), device="cuda"), torch.randn(R, device="cuda")
    groups = torch.tensor([0, R // 2, R], device="cuda")
    logits = matmul(x, head, leaves, out_dtype=f32)
    exclude_padding(logits, tokens)
    want = vocab_logprob(vocab_nodes(logits, t, leaves), logits.gather(1, targets[:, None])[:, 0], t)
    cut = Truncation(*(torch.tensor(v, device="cuda") for v in ([1, 4], [5, 0], [1.0, 0.9], [0.0, 0.0])))
    found = []
    for fused in (True, False):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(hopper, "_fused", lambda *_: False)
            assert_same_bits(
                hopper.linear(x, head, targets, t, leaves, fused, None, tokens)[:2], want, f"fused {fused}"
            )
            a, b = x.clone().requires_grad_(), head.clone().requires_grad_()
            y = linear_logprob(a, b, targets, t, leaves, groups, cut, tokens)
            y.nan_to_num(neginf=0.0).backward(g)
            found.append([y.detach(), a.grad, b.grad])
            assert not b.grad[tokens:].any()
    assert_same_bits(found[0], found[1], "fused against not")
