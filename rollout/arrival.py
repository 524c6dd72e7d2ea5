"""Pieces of a publication on their way into an engine's weights: copied, or of a projection in a quantized format gathered
until it is whole, quantized, and then forgotten."""

from collections.abc import Mapping
from math import prod

import torch

from kernels.model import ModelConfig, Parameter, Weight, served
from kernels.ops import Quantized
from kernels.tree import Shard
from kernels.weights.fingerprint import fingerprint, unsigned
from kernels.weights.reshard import Piece, shard_rows
from rollout.held import copy, views


class Arrival:
    """Gathers one publication in the tensors of a `rollout.held.weight_memory`.

    What was published, and what both sides compare, is rounded to `dtype`; of a quantized parameter it is gone once it was
    quantized. So its fingerprint is taken before, and `before` holds by how much that is more than the one of what it became:
    an engine whose values and scales still are those has the published fingerprint, and no other has."""

    def __init__(
        self, config: ModelConfig, shard: Shard, dtype: torch.dtype, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        self.config, self.shard, self.dtype, self.weights = config, shard, dtype, views(config, tensors)
        self.before: dict[str, torch.Tensor] = {}
        self._gathered: dict[str, torch.Tensor] = {}
        self._missing = {p.name: prod(p.part(shard).shape) for p in served(config) if config.quantizes(p)}

    def take(self, piece: Piece, rows: torch.Tensor) -> None:
        """Copies a piece [rows, columns] to where it belongs."""
        p = piece.parameter
        target = self.open(p)
        target.view(len(target), -1)[piece.target : piece.target + piece.rows].copy_(rows)
        if p.name in self._missing:
            self._missing[p.name] -= rows.numel()
            if not self._missing[p.name]:
                self.close(p)

    def open(self, p: Parameter) -> torch.Tensor:
        """Returns where a parameter's values belong: the weight itself or, of a quantized one, a tensor until `close`."""
        target = self.weights[p.name]
        if not isinstance(target, Quantized):
            return target
        if p.name not in self._gathered:
            self._gathered[p.name] = torch.empty(target.shape, dtype=self.dtype, device=target.device)
        return self._gathered[p.name]

    def close(self, p: Parameter) -> None:
        """Quantizes what has gathered of a parameter, where it is one that is quantized."""
        if p.name in self._gathered:
            self._quantize(p)

    def _quantize(self, p: Parameter) -> None:
        gathered, target = self._gathered.pop(p.name), self.weights[p.name]
        assert isinstance(target, Quantized)
        copy(target, self.config.quantize(gathered))
        self.before[p.name] = _fingerprint(p, self.shard, gathered) - _fingerprint(p, self.shard, target)

    def fingerprints(self) -> list[int]:
        """Returns the fingerprint of the shard's part of every parameter, in order, as it was published."""
        return fingerprints(self.config, self.shard, self.weights, self.before)


def fingerprints(
    config: ModelConfig, shard: Shard, weights: Mapping[str, Weight], before: Mapping[str, torch.Tensor]
) -> list[int]:
    """Returns the fingerprint of a shard's part of every parameter, in order, each below 2^64. `before`: as of `Arrival`."""
    sums = [_fingerprint(p, shard, weights[p.name]) + before.get(p.name, 0) for p in served(config)]
    return [unsigned(value) for value in torch.stack(sums).tolist()]


def _fingerprint(p: Parameter, shard: Shard, held: Weight) -> torch.Tensor:
    if isinstance(held, Quantized):
        return _fingerprint(p, shard, held.values) + 3 * _fingerprint(p.scales, shard, held.scales)
    column = shard.rank * held.shape[1] if p.axis == 1 else 0
    sums = [fingerprint(held[at : at + len(rows)], rows.start, column) for rows, at in shard_rows(p, shard)]
    return torch.stack(sums).sum()
