"""Comparison of tensors by their bytes: no tolerance, -0 differs from +0, and a NaN equals the same NaN."""

import hashlib
from collections.abc import Iterable

import torch

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Tensors = torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]


def integers(t: torch.Tensor) -> torch.Tensor:
    """The bit patterns of `t`, as integers of its width on the CPU."""
    return t.detach().cpu().contiguous().view(_INTEGER[t.element_size()])


def assert_same_bits(actual: Tensors, expected: Tensors, what: str = "") -> None:
    """Fails with how many elements differ and where the first does: its coordinate, both bit patterns, both values."""
    __tracebackhide__ = True
    what = what or "tensors"
    if isinstance(actual, tuple | list) or isinstance(expected, tuple | list):
        assert len(actual) == len(expected), f"{what}: {len(actual)} tensors against {len(expected)}"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_bits(a, e, f"{what}[{i}]")
        return
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} against {tuple(expected.shape)}"
    a, e = integers(actual), integers(expected)
    different = (a != e).nonzero()
    if not len(different):
        return
    at = tuple(different[0].tolist())
    digits, mask = 2 * a.element_size(), (1 << 8 * a.element_size()) - 1
    got, want = (f"{int(t[at]) & mask:0{digits}x}" for t in (a, e))
    values = f"{actual[at].item()!r} against {expected[at].item()!r}"
    raise AssertionError(
        f"{what}: {len(different)} of {a.numel()} differ, first at {list(at)}: {got} != {want} ({values})"
    )


def sha256(tensors: Iterable[torch.Tensor]) -> str:
    """One digest of the shapes, dtypes and bytes of some tensors."""
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{tuple(t.shape)}{t.dtype}".encode())
        digest.update(integers(t).numpy().tobytes())
    return digest.hexdigest()
