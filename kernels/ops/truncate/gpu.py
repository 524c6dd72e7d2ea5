"""GPU truncation: the operations of cpu.c one by one, so the integers are the CPU's."""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import exp_f32


@triton.jit
def weights_kernel(logits, temperature, top, weight, n, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + r * n + i, mask=i < n, other=float("-inf"))
    z = tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + tl.load(temperature + r))
    e = exp_f32(z - tl.load(top + r)) * 1099511627776.0
    tl.store(weight + r * n + i, tl.where(e == e, e, 0.0).to(tl.int64), mask=i < n)


def weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    rows, n = logits.shape
    logits, temperature = logits.contiguous(), temperature.contiguous()
    out = torch.empty(rows, n, dtype=torch.int64, device=logits.device)
    if rows:
        top = logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1) / temperature
        weights_kernel[(rows, triton.cdiv(n, 1024))](logits, temperature, top, out, n, 1024, enable_fp_fusion=False)
    return out
