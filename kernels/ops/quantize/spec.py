"""Specs of quantization to block-scaled FP8, and back."""

import torch

from kernels.ops.quantize import BLOCK, FP8, LARGEST, Quantized, dequantize_blocks, quantize_blocks, quantize_rows
from kernels.spec import Case, Inputs, OpSpec, Work, spread

_SMALLEST = 2.0**-126
_HALF_A_SUBNORMAL = 2.0**-10 / torch.finfo(torch.float32).eps
"""What a subnormal e4m3 is rounded by, at most, in the units of a spec's accuracy."""


def each_element(scales: torch.Tensor, height: int) -> torch.Tensor:
    """Repeats the scale of each block of `height` x 128 for each of its elements."""
    return scales.repeat_interleave(height, 0).repeat_interleave(BLOCK, 1)


def reference_scales(x: torch.Tensor, height: int, power_of_two: bool) -> torch.Tensor:
    """Returns float64 scales of blocks of `height` x 128 of a float64 x of bfloat16 values, one for each block."""
    (T, K) = x.shape
    most = x.abs().view(T // height, height, K // BLOCK, BLOCK).amax((1, 3))
    scales = (most.float() / LARGEST).double().clamp(min=_SMALLEST)
    mantissa, exponent = torch.frexp(scales)
    return torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int()) if power_of_two else scales


def _make(case: Case, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
    rows = case["rows"] if "rows" in case else BLOCK * case["blocks"]
    x = spread((rows, BLOCK * case["columns"]), generator, device, dtype, octaves=12)
    x[rows // 2, :BLOCK] = 0
    x[: BLOCK + 1, -BLOCK:] *= 2.0**-120  # subnormals, among them scales that are raised to 2^-126
    return {"x": x, "power_of_two": bool(case["power_of_two"])}


def _rows(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    made = quantize_rows(i["x"], i["power_of_two"])
    return made.values, made.scales


def _blocks(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    made = quantize_blocks(i["x"], i["power_of_two"])
    return made.values, made.scales.repeat_interleave(BLOCK, 0)


def _reference(i: Inputs, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    scales = reference_scales(i["x"], height, i["power_of_two"])
    return i["x"] / each_element(scales, height), scales.repeat_interleave(height, 0)


def _scale(i: Inputs, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = _reference(i, height)
    return values.abs() + _HALF_A_SUBNORMAL, scales


def _halves(run, i: Inputs) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
    """The columns of one block, and those of all others, each alone."""
    parts = [run({**i, "x": part}) for part in (i["x"][:, :BLOCK], i["x"][:, BLOCK:]) if part.shape[1]]
    return tuple(torch.cat(each, 1) for each in zip(*parts, strict=True))


def _plain(x: torch.Tensor) -> torch.Tensor:
    return (x.float() / (x.abs().amax(1, keepdim=True).float() / LARGEST)).clamp(-LARGEST, LARGEST).to(FP8)


def _work(case: Case, size: int) -> Work:
    rows = case["rows"] if "rows" in case else BLOCK * case["blocks"]
    elements = rows * BLOCK * case["columns"]
    return Work(3.0 * elements, (size + 1.0) * elements, backward=0, by_flops=False)


ROWS = OpSpec(
    name="quantize_rows",
    make=_make,
    run=_rows,
    reference=lambda i: _reference(i, 1),
    scale=lambda i: _scale(i, 1),
    cases=({"rows": 1, "columns": 1, "power_of_two": 0}, {"rows": 40, "columns": 3, "power_of_two": 1}),
    space={"rows": (1, 2, 7, 20), "columns": (1, 2, 3), "power_of_two": (0, 1)},
    claims=("batch", "position", "padding", "blocks of columns", "threads", "alignment", "strides"),
    accuracy=1.0,
    dtypes=(torch.bfloat16,),
    families=("hopper",),
    row_inputs=("x",),
    variants={"blocks of columns": lambda i, _: _halves(_rows, i)},
    work=_work,
    vendor=lambda i: _plain(i["x"]),
    bench=({"rows": 1024, "columns": 8, "power_of_two": 0},),
)
BLOCKS = OpSpec(
    name="quantize_blocks",
    make=_make,
    run=_blocks,
    reference=lambda i: _reference(i, BLOCK),
    scale=lambda i: _scale(i, BLOCK),
    cases=({"blocks": 1, "columns": 1, "power_of_two": 0}, {"blocks": 3, "columns": 2, "power_of_two": 1}),
    space={"blocks": (1, 2, 3), "columns": (1, 2, 3), "power_of_two": (0, 1)},
    claims=("batch", "position", "padding", "blocks of columns", "threads", "alignment", "strides"),
    accuracy=1.0,
    dtypes=(torch.bfloat16,),
    families=("hopper",),
    row_inputs=("x",),
    row_units=lambda i: i["x"].shape[0] // BLOCK,
    unit_rows=lambda i, at: (at[:, None] * BLOCK + torch.arange(BLOCK, device=at.device)).flatten(),
    variants={"blocks of columns": lambda i, _: _halves(_blocks, i)},
    work=_work,
    vendor=lambda i: _plain(i["x"]),
    bench=({"blocks": 8, "columns": 8, "power_of_two": 0},),
)


def _make_quantized(case: Case, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
    shape = case["blocks"], case["columns"]
    values = spread((shape[0] * BLOCK, shape[1] * BLOCK), generator, device, torch.float32)
    return {"values": values.to(FP8), "scales": spread(shape, generator, device, torch.float32).abs()}


DEQUANTIZE = OpSpec(
    name="dequantize_blocks",
    make=_make_quantized,
    run=lambda i: dequantize_blocks(Quantized(i["values"], i["scales"])),
    reference=lambda i: i["values"] * each_element(i["scales"], BLOCK),
    cases=({"blocks": 1, "columns": 1}, {"blocks": 3, "columns": 2}),
    space={"blocks": (1, 2, 3), "columns": (1, 2, 3)},
    claims=("threads", "alignment", "strides"),
    accuracy=1.0,
    dtypes=(torch.bfloat16,),
    families=("hopper",),
    work=lambda c, size: Work(
        1.0 * BLOCK**2 * c["blocks"] * c["columns"],
        (size + 1.0) * BLOCK**2 * c["blocks"] * c["columns"],
        backward=0,
        by_flops=False,
    ),
    vendor=lambda i: i["values"].to(torch.bfloat16),
    bench=({"blocks": 8, "columns": 8},),
)
SPECS = (ROWS, BLOCKS, DEQUANTIZE)
