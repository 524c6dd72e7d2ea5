"""Gumbel-max sampling with counter-based noise."""

import torch

from kernels.device import UnsupportedError, same_device


def gumbel_argmax(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: torch.Tensor,
    first_id: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (score, id, logit) of argmax_v logits[v] / temperature + gumbel(seed, position, v); no noise where `greedy`.

    logits float32 [R, V], the ids first_id .. first_id + V (first_id a multiple of 4); temperature float32 [R]; seeds and
    positions int64 [R]; greedy uint8 [R]. The lowest id wins a tie; across shards the caller keeps the highest score of the
    lowest rank. An id of -1 means that no logit was a number.

    The noise is a pure function of (seed, position, id), so a draw does not depend on batch, order, shard or history.
    Sampling by perturbed maximum: Maddison et al. 2014, section 2.
    """
    if first_id % 4:
        raise UnsupportedError(f"sampling: a vocabulary shard starts at id {first_id}, which is not a multiple of 4")
    return same_device("sample", logits, temperature).gumbel_argmax(
        logits, temperature, seeds, positions, greedy, first_id
    )
