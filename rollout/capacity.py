"""What one rank of an engine needs of memory, and how many pages the rest has room for."""

from kernels.model import ModelConfig, costs
from rollout.scheduler import Limits

ENGINE_PROCESS = 330 * 2**20
"""Bytes of a Python process with torch, beside its tensors, measured on Linux with the CPU build."""


def serving_bytes(model: ModelConfig, limits: Limits, tp: int, width: int) -> int:
    """Counts the activations of the largest step, and the logits of all that it samples. `width`: bytes of an element."""
    tokens = min(limits.max_batch_tokens, limits.max_running * limits.prefill_chunk)
    return costs.serving_bytes(model, tokens, limits.rows, tp, width)


def tokens_that_fit(model: ModelConfig, limits: Limits, tp: int, width: int, room: int) -> int:
    """Says how many tokens' keys and values fit into `room` bytes beside weights and activations; negative if those
    alone do not fit."""
    rest = room - costs.weight_bytes(model, tp, width) - serving_bytes(model, limits, tp, width)
    return rest // costs.token_bytes(model, tp, width)
