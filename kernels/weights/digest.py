"""The digest of a model that trainer and sampler must agree on: SHA-256 of slices, and of all of them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch

from kernels.model import ModelConfig, Parameter
from kernels.tree import Shard

Leaves = dict[tuple[str, int], str]
"""SHA-256 of slices of parameters, by (name, slice number)."""


def slice_digests(config: ModelConfig, parameter: Parameter, held: torch.Tensor, shard: Shard) -> Leaves:
    """Hashes each 1 / leaves slice of `parameter` that this shard holds, keyed by (name, slice number)."""
    if parameter.axis is None:
        return {(parameter.name, 0): _sha256(held)}
    slices = config.leaves // shard.size
    part = parameter.part(shard)
    held = held.detach().cpu()
    with ThreadPoolExecutor(min(8, slices)) as pool:  # hashing leaves the interpreter free
        hashes = list(pool.map(lambda i: _sha256(part.shard(held, Shard(i, slices))), range(slices)))
    return {(parameter.name, shard.rank * slices + i): value for i, value in enumerate(hashes)}


def digest(leaves: Leaves) -> str:
    """Hashes a model by SHA-256 over the sorted lines `name slice sha256`. It is a pure function of the weights and
    `model.leaves`: the same from a trainer that holds all slices and from tensor-parallel ranks that hold a few each."""
    lines = "".join(f"{name} {i} {value}\n" for (name, i), value in sorted(leaves.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()
