"""CPU log-probabilities: see cpu.c. The logits of one micro-batch are materialised and computed again for the gradient."""

from collections.abc import Callable, Sequence

import torch

from kernels.cpu import call
from kernels.device import UnsupportedError
from kernels.ops.matmul import input_gradient, matmul, weight_gradient
from kernels.ops.truncate import Truncation, exclude_padding, truncate
from kernels.tree import is_power_of_two


def nodes(logits: torch.Tensor, temperature: torch.Tensor, leaves: int) -> torch.Tensor:
    """Computes the node (maximum, sum of exponentials) of each leaf of logits [R, V]: -> float32 [R, leaves, 2]."""
    rows, vocab = logits.shape
    out = torch.empty(rows, leaves, 2)
    call("vocab_nodes", logits.contiguous(), temperature.contiguous(), out, rows, leaves, vocab // leaves)
    return out


def logprob(nodes: torch.Tensor, picked: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Folds nodes [R, leaves, 2] up the tree: -> (log-prob of the logits `picked`, log-sum-exp), both float32 [R]."""
    rows, leaves, _ = nodes.shape
    if not is_power_of_two(leaves):
        raise UnsupportedError(f"log-prob: {leaves} leaves of the vocabulary; the number must be a power of two")
    out, lse = torch.empty(rows), torch.empty(rows)
    scratch = nodes.clone(memory_format=torch.contiguous_format)
    call("vocab_logprob", scratch, picked.contiguous(), temperature.contiguous(), out, lse, rows, leaves)
    return out, lse


def linear(
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    leaves: int,
    keep: bool,
    truncation: Truncation | None,
    vocabulary: int,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Returns (log-probability, log-sum-exp) of each target. Nothing is kept for the gradient."""
    logits = _logits(x, head, temperature, leaves, truncation, vocabulary)
    picked = logits.gather(1, targets[:, None])[:, 0]
    return *logprob(nodes(logits, temperature, leaves), picked, temperature), None


def _logits(
    x: torch.Tensor,
    head: torch.Tensor,
    temperature: torch.Tensor,
    leaves: int,
    truncation: Truncation | None,
    vocabulary: int,
) -> torch.Tensor:
    logits = matmul(x.detach(), head.detach(), leaves, out_dtype=torch.float32)
    exclude_padding(logits, vocabulary)
    if truncation is not None:
        truncate(logits, temperature, truncation)
    return logits


def backward(
    x: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    lse: torch.Tensor,
    d_logprob: torch.Tensor,
    leaves: int,
    groups: torch.Tensor | None,
    kept: None,
    truncation: Truncation | None,
    vocabulary: int,
    told: Callable[[Sequence[torch.Tensor]], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes the gradients to x, and to the head where it is asked for, from logits that are computed again. `told`: is shown
    the gradient of the logits, in the dtype of x, leaf by leaf: [R, V / leaves] each."""
    logits = _logits(x, head, temperature, leaves, truncation, vocabulary)
    of_rows = (t.contiguous() for t in (temperature, lse, targets, d_logprob.float()))
    call("vocab_backward", logits, *of_rows, *logits.shape)
    d_logits = logits.to(x.dtype)
    if told:
        told(d_logits.chunk(leaves, 1))
    dx = input_gradient(d_logits, head, leaves)
    return dx, None if groups is None else weight_gradient(d_logits, x, groups)
