"""Top-k, top-p and min-p: which tokens a sampler may draw."""

import torch

from kernels.device import UnsupportedError, same_device


def kept_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """uint8 [R, V]: 1 where a token passes all three filters, each of which looks at p = softmax(logits / temperature), tokens
    ordered by falling logit and, among equals, by rising id:

        top_k   it is among the first k                              (0: no limit)
        top_p   the tokens before it have a probability below top_p  (1: no limit)
        min_p   p >= min_p max p                                     (0: no limit)

    The first token always passes. logits float32 [R, V], the whole vocabulary; temperature, top_p, min_p float32 [R]; top_k
    int64 [R]. Probabilities are compared as integers, floor(2^40 e^(z - max z)), so that their sums have no order.

    Invariant to batch and position. Nucleus sampling: Holtzman et al. 2019, section 3.1; min-p: Nguyen et al. 2024, section 3.
    """
    if logits.dtype != torch.float32 or logits.dim() != 2:
        raise UnsupportedError(f"truncate: logits {tuple(logits.shape)} {logits.dtype} must be float32 [R, V]")
    weight = same_device("truncate", logits, temperature).weights(logits, temperature)
    order = logits.sort(dim=1, descending=True, stable=True).indices
    weight = weight.gather(1, order)
    before = weight.cumsum(1) - weight
    largest = float(1 << 40)
    place = torch.arange(logits.shape[1], device=logits.device)
    passes = (place < top_k[:, None]) | (top_k == 0)[:, None]
    passes &= (before.double() < (top_p.double() * weight.sum(1).double())[:, None]) | (top_p >= 1)[:, None]
    passes &= weight.double() >= (min_p.double() * largest)[:, None]
    return torch.zeros_like(weight, dtype=torch.uint8).scatter_(1, order, passes.to(torch.uint8))
