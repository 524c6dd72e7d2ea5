"""Remembered launches: a call after another of other shapes, alignments or addresses runs what it would have run alone."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.gpu.launch import boxes, launch
from kernels.ops.matmul.hopper import many_rows
from kernels.ops.matmul.portable import order
from tests.bits import assert_same_bits

pytestmark = pytest.mark.gpu


@triton.jit(do_not_specialize=["free"])
def add_kernel(x, y, n, free, scale, tables, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    v = tl.load(x + i, mask=i < n, other=0.0) * scale + free + tl.load(tables[0]) + tl.load(tables[1])
    tl.store(y + i, v, mask=i < n)


def test_every_kind_of_argument() -> None:
    tables = torch.tensor([3.0], device="cuda"), torch.tensor([5.0], device="cuda")
    for _ in range(2):  # compiled, then remembered
        for n in (1, 7, 16, 100):
            for shift in (0, 1, 4):
                for dtype in (torch.float32, torch.bfloat16):
                    for free, scale, size in ((1, 1.0, 32), (16, 0.5, 64), (1 << 33, 0.0, 32)):
                        x = torch.arange(n + shift, device="cuda").to(dtype)[shift:]
                        y = torch.full((n,), torch.nan, device="cuda")
                        launch(add_kernel, (triton.cdiv(n, size),), x, y, n, free, scale, tables, size, num_warps=1)
                        assert_same_bits(y, x.float() * scale + float(free) + 8.0)


def test_descriptors_at_one_address() -> None:
    room = torch.randn(1 << 20, device="cuda").to(torch.bfloat16)
    for _ in range(2):
        for M, K in ((300, 512), (200, 1024), (512, 512)):
            x, w = room[: M * K].view(M, K), room[-256 * K :].view(256, K)
            y = torch.full((M, 256), torch.nan, device="cuda")
            many_rows.launch(x, w, y, M, 256, 8)
            assert_same_bits(y, order.contract(x, w, list(range(0, K + 1, K // 8))))
    assert boxes(room.view(1024, 1024), 64, 64) is boxes(room.view(1024, 1024), 64, 64)
    assert boxes(room.view(1024, 1024), 64, 64) is not boxes(room.view(2048, 512), 64, 64)
