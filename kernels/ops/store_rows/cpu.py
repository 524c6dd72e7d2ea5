"""CPU store_rows."""

import torch


def store(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor
) -> None:
    """Writes new keys and values [T, KV, D] to the rows `slots` of the pools, in place."""
    keys[slots] = new_keys
    values[slots] = new_values
