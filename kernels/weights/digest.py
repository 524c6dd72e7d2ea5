"""The digest of a model that trainer and sampler must agree on: SHA-256 of slices, and of all of them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch

from kernels.model import ModelConfig, Parameter, Weight
from kernels.ops import Quantized
from kernels.tree import Shard

Leaves = dict[tuple[str, int], str]
"""SHA-256 of slices of parameters, by (name, slice number)."""


def slice_digests(config: ModelConfig, parameter: Parameter, held: Weight, shard: Shard) -> Leaves:
    """Hashes each 1 / leaves slice of `parameter` that this shard holds, keyed by (name, slice number). Of a projection in a
    quantized format: its values, then its scales; bfloat16, which is what was published, is quantized for that. Float32
    masters are hashed as they are."""
    if isinstance(held, torch.Tensor) and held.dtype == torch.bfloat16 and config.quantizes(parameter):
        held = config.quantize(held.detach())
    part, slices = parameter.part(shard), config.leaves // shard.size
    if isinstance(held, Quantized):
        parts = [(part, held.values.cpu()), (part.scales, held.scales.cpu())]
    elif parameter.axis is None:
        return {(parameter.name, 0): _sha256(held)}
    else:
        parts = [(part, held.detach().cpu())]

    def hashed(i: int) -> str:
        return _sha256(*(of.shard(tensor, Shard(i, slices)) for of, tensor in parts))

    with ThreadPoolExecutor(min(8, slices)) as pool:  # hashing leaves the interpreter free
        hashes = list(pool.map(hashed, range(slices)))
    return {(parameter.name, shard.rank * slices + i): value for i, value in enumerate(hashes)}


def digest(leaves: Leaves) -> str:
    """Hashes a model by SHA-256 over the sorted lines `name slice sha256`. It is a pure function of the weights and
    `model.leaves`: the same from a trainer that holds all slices and from tensor-parallel ranks that hold a few each."""
    lines = "".join(f"{name} {i} {value}\n" for (name, i), value in sorted(leaves.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
