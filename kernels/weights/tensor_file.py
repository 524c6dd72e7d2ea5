"""A safetensors file written one tensor at a time: no copy of the whole is held, and its digest comes with it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class WrittenFile:
    """Names a file that is on the disk, and what it must hold."""

    name: str
    bytes: int
    sha256: str


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> WrittenFile:
    """Writes `tensors` (name, tensor of `dtype` on any device), which come in the order of `shapes`, and waits for the disk.
    The bytes are a pure function of names, shapes, dtype and values."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    digest = hashlib.sha256()
    expected = iter(shapes.items())
    with open(path, "wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for name, tensor in tensors:
            if (name, tuple(tensor.shape), tensor.dtype) != (*next(expected, ("no tensor", ())), dtype):
                raise ValueError(
                    f"{path}: {name} {tuple(tensor.shape)} {tensor.dtype} is not the next tensor of the header"
                )
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        if left := next(expected, None):
            raise ValueError(f"{path}: {left[0]} was not given")
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return WrittenFile(path.name, size, digest.hexdigest())
