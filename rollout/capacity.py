"""What one rank of an engine needs of memory, and how many pages the rest has room for."""

from pathlib import Path

from kernels.model import ModelConfig
from rollout.scheduler import Limits

ENGINE_PROCESS = 330 * 2**20
"""Bytes of a Python process with torch, beside its tensors, measured on Linux with the CPU build."""


def available_memory() -> int:
    """Bytes of this machine that a process could have; 0 where the system does not say."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 0)


def weights_bytes(model: ModelConfig, tp: int, width: int) -> int:
    """`width`: bytes of an element, here and below."""
    return width * model.parameter_count // tp


def token_bytes(model: ModelConfig, tp: int, width: int) -> int:
    """Keys and values of one token, in all layers."""
    return 2 * width * model.layers * (model.kv_heads // tp) * model.head_dim


def serving_bytes(model: ModelConfig, limits: Limits, tp: int, width: int) -> int:
    """Activations of the largest step, and the logits of all that it samples."""
    tokens = min(limits.max_batch_tokens, limits.max_running * limits.prefill_chunk)
    residual = 4 * model.hidden_size  # the stream, the delta to it, a norm and a sum on its way
    inner = 3 * model.intermediate_size // tp
    logits = 3 * 4 * limits.max_running * model.vocab_size // tp  # the logits, their noise, and masks
    return width * tokens * (residual + inner) + logits


def tokens_that_fit(model: ModelConfig, limits: Limits, tp: int, width: int, room: int) -> int:
    """Whose keys and values lie in `room` bytes beside weights and activations; less than 0: those do not fit themselves."""
    rest = room - weights_bytes(model, tp, width) - serving_bytes(model, limits, tp, width)
    return rest // token_bytes(model, tp, width)
