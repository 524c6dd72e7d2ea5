"""CPU sampling: see cpu.c."""

import torch

from kernels.cpu import call
from kernels.device import UnsupportedError


def gumbel_argmax(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: torch.Tensor,
    first_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws a token a row of float32 logits [R, V]: -> (best score, id int64, its logit), each [R]. UnsupportedError for a
    temperature of 0 or below."""
    rows, n = logits.shape
    if (temperature <= 0).any():
        raise UnsupportedError(f"sampling: temperature {temperature.min().item()} must be positive; greedy rows take 1")
    best, ids, picked = torch.empty(rows), torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    call(
        "gumbel_argmax",
        logits.contiguous(),
        temperature,
        seeds,
        positions,
        greedy,
        best,
        ids,
        picked,
        rows,
        n,
        first_id,
    )
    return best, ids, picked


def noise_words(seed: int, position: int, ids: int) -> torch.Tensor:
    """Returns the 32-bit words behind the noise of ids 0 .. ids, as int32 [ids]."""
    words = torch.empty(ids, dtype=torch.int32)
    call("noise_words", seed, position, ids, words)
    return words
