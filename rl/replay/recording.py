"""Records what each op of a forward pass returns: a digest of the bytes of every row, by layer and op."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

from kernels.model import ModelConfig
from kernels.model.operations import Operations, Seen, not_seen

Stage = tuple[int, str]
"""A layer and an op of it; layer -1 comes before the first, and the number of layers after the last."""
LOGPROB = "log-prob"


class Recording:
    """Holds, of every stage in the order in which they came first, uint64 [T]: the digest of each token's row, 0 where there is
    none; and the rows themselves of one stage and token, if `watched` names it."""

    def __init__(self, tokens: int, watched: tuple[Stage, int] | None = None) -> None:
        self.digests: dict[Stage, np.ndarray] = {}
        self.row: list[torch.Tensor] = []  # of what is watched
        self._tokens, self._watched = tokens, watched
        self._places: Sequence[int] | np.ndarray = ()

    def at(self, places: Sequence[int] | np.ndarray) -> None:
        """Says which tokens the rows of the next pass are."""
        self._places = places

    def __call__(self, layer: int, op: str, *outputs: torch.Tensor) -> None:
        """Takes what an op returned, as `kernels.model.operations.Seen`."""
        self.put((layer, op), self._places, *outputs)

    def put(self, stage: Stage, places: Sequence[int] | np.ndarray, *outputs: torch.Tensor) -> None:
        """Takes the rows of `outputs`, [len(places), ...] each, which are those of the tokens `places`."""
        held = [_bytes(t.detach(), len(places)) for t in outputs]
        into = self.digests.setdefault(stage, np.zeros(self._tokens, np.uint64))
        for i, place in enumerate(places):
            into[place] = _digest([rows[i] for rows in held])
        if (
            self._watched
            and self._watched[0] == stage
            and (at := np.flatnonzero(np.equal(places, self._watched[1]))).size
        ):
            self.row = [t.detach().reshape(len(places), -1)[int(at[0])].cpu().clone() for t in outputs]


@dataclass(frozen=True)
class Watched(ModelConfig):
    """Describes a model whose ops show what they return."""

    shown: Seen = field(default=not_seen, compare=False)

    @property
    def ops(self) -> Operations:
        """Returns the ops of the model, and who is shown their outputs."""
        return replace(super().ops, seen=self.shown)


def watched(config: ModelConfig, shown: Seen) -> Watched:
    """Returns the same model, whose ops show `shown` what they return."""
    return Watched(**{f.name: getattr(config, f.name) for f in fields(ModelConfig)}, shown=shown)


def _bytes(t: torch.Tensor, rows: int) -> np.ndarray:
    return t.reshape(rows, -1).contiguous().view(torch.uint8).cpu().numpy()


def _digest(rows: Sequence[np.ndarray]) -> int:
    """64 bits of BLAKE2b, never 0: that stands for no row."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(row.tobytes())
    return int.from_bytes(digest.digest(), "little") or 1
