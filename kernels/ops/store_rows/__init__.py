"""Keys and values into the cache."""

import torch

from kernels.device import UnsupportedError, same_device


def store_rows(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor
) -> None:
    """Writes keys[slots[t]] = new_keys[t] and values[slots[t]] = new_values[t], in place; a copy of bits.

    keys, values [rows, kv_heads, head_dim], contiguous; slots int64 [T], each below `rows` and used once; new_keys and
    new_values [T, kv_heads, head_dim] of their dtype. No gradient.
    """
    if keys.shape != values.shape or new_keys.shape != new_values.shape or new_keys.shape[1:] != keys.shape[1:]:
        raise UnsupportedError(
            f"store_rows: {tuple(new_keys.shape)} and {tuple(new_values.shape)} into {tuple(keys.shape)}, {tuple(values.shape)}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()) or new_keys.dtype != keys.dtype:
        raise UnsupportedError(f"store_rows: a {keys.dtype} cache must be contiguous and take {new_keys.dtype} rows")
    same_device("store_rows", keys, new_keys, slots).store(keys, values, slots, new_keys, new_values)
