"""Distance from float64, ours and that of torch's own bfloat16 ops on the same inputs: ours must be no worse.

Relative error in the Euclidean norm; `pytest -s` prints the table. Both sides round to bfloat16 at the end, so equal
numbers mean that this last rounding is all there is. Both may round in between (the weights of attention).
"""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from kernels.model import Layout
from kernels.ops import attention, linear_logprob, matmul, norm_rope, rms_norm, rope_table, swiglu
from tests.kernels.gpu.accuracy import relative_error

pytestmark = pytest.mark.gpu
bf16 = torch.bfloat16
SLACK = 1.02
Op = Callable[..., torch.Tensor]


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(bf16)


def whole(rows: int) -> torch.Tensor:
    return torch.tensor([0, rows], device="cuda")


def matmul_case(M: int, N: int, K: int) -> tuple[Op, Op, Op, dict[str, torch.Tensor]]:
    def theirs(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w.T

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return matmul(x, w, 8, groups=whole(M))

    return ours, theirs, theirs, {"x": normal(M, K), "w": normal(N, K, scale=K**-0.5)}


def attention_case(T: int, heads: int, kv_heads: int, D: int) -> tuple[Op, Op, Op, dict[str, torch.Tensor]]:
    pages = Layout.packed([T], [1], "cuda").pages

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, pages, D**-0.5)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        score = torch.einsum("thd,shd->hts", q, k) * D**-0.5
        score = score.masked_fill(torch.ones(T, T, device="cuda").triu(1).bool(), -torch.inf)
        return torch.einsum("hts,shd->thd", score.softmax(-1), v)

    return ours, theirs, exact, {"q": normal(T, heads, D), "k": normal(T, kv_heads, D), "v": normal(T, kv_heads, D)}


def logprob_case(R: int, n: int, V: int) -> tuple[Op, Op, Op, dict[str, torch.Tensor]]:
    targets, t = torch.randint(V, (R,), device="cuda"), torch.rand(R, device="cuda") + 0.5

    def ours(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return linear_logprob(x, head, targets, t, 8, whole(R))

    def theirs(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Logits in bfloat16, the loss in float32, as transformers has it."""
        z = (x @ head.T).to(torch.promote_types(x.dtype, torch.float32)) / t[:, None]
        return z.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    return ours, theirs, theirs, {"x": normal(R, n), "head": normal(V, n, scale=2 * n**-0.5)}


def norm_case(rows: int, n: int) -> tuple[Op, Op, Op, dict[str, torch.Tensor]]:
    def theirs(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (n,), w, 1e-6)

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, w, 1e-6, groups=whole(rows))

    return ours, theirs, theirs, {"x": normal(rows, n), "w": (1 + 0.2 * torch.randn(n, device="cuda")).to(bf16)}


def swiglu_case(rows: int, n: int) -> tuple[Op, Op, Op, dict[str, torch.Tensor]]:
    def theirs(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, 1)
        return F.silu(gate) * up

    return swiglu, theirs, theirs, {"x": normal(rows, 2 * n, scale=2)}


def rope_case(rows: int, heads: int, D: int) -> tuple[Op, Op, Op, dict[str, torch.Tensor]]:
    cosine, sine = (t.cuda() for t in rope_table(4096, D, 1e6))
    positions = torch.randint(4096, (rows,), device="cuda").int()

    def theirs(x: torch.Tensor) -> torch.Tensor:
        """As transformers has it: the table in the dtype of x. The exact one has our float32 table."""
        c, s = (torch.cat([t[positions.long()]] * 2, -1)[:, None].to(x.dtype) for t in (cosine, sine))
        a, b = x.chunk(2, -1)
        return x * c + torch.cat([-b, a], -1) * s

    def ours(x: torch.Tensor) -> torch.Tensor:
        return torch.cat(norm_rope(x, None, 0.0, (cosine, sine), positions, heads // 2), 1)

    return ours, theirs, theirs, {"x": normal(rows, heads, D)}


CASES = {
    "matmul 300 x 1024 x 2048": lambda: matmul_case(300, 1024, 2048),
    "matmul 512 x 4096 x 12288": lambda: matmul_case(512, 4096, 12288),
    "attention 300": lambda: attention_case(300, 16, 8, 128),
    "attention 1100": lambda: attention_case(1100, 16, 8, 128),
    "log-prob 200 x 1024 x 9600": lambda: logprob_case(200, 1024, 9600),
    "log-prob 130 x 4096 x 9600": lambda: logprob_case(130, 4096, 9600),
    "rms_norm 512 x 4096": lambda: norm_case(512, 4096),
    "swiglu 512 x 12288": lambda: swiglu_case(512, 12288),
    "rope 512 x 32 x 128": lambda: rope_case(512, 32, 128),
}


def errors(op: Op, inputs: dict[str, torch.Tensor], dtype: torch.dtype, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradients of `op` on `inputs` in `dtype`."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    y = op(*leaves.values())
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_the_vendor(name: str) -> None:
    ours, theirs, exact, inputs = CASES[name]()
    with torch.no_grad():
        y = ours(*inputs.values())
    dy = torch.randn(y.shape, device="cuda").to(y.dtype)
    want = errors(exact, inputs, torch.float64, dy)
    got, vendor = (errors(op, inputs, bf16, dy) for op in (ours, theirs))
    worse = []
    for what, right in want.items():
        mine, peer = relative_error(got[what], right), relative_error(vendor[what], right)
        print(f"{name:28s} {what:6s} ours {mine:.3e}  vendor {peer:.3e}  ratio {mine / peer:.3f}")
        if not mine <= SLACK * peer:
            worse.append(f"{what}: ours {mine:.3e}, vendor {peer:.3e}")
    assert not worse, f"{name}: {worse}"
