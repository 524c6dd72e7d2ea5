"""CPU store_rows."""

import torch


def store(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor
) -> None:
    keys[slots] = new_keys
    values[slots] = new_values
