"""numerics=fast is the same model with the vendor's sums: close to the exact one, and not equal to it."""

from dataclasses import replace

import pytest
import torch

from kernels.contract import same_bits
from kernels.model import ConfigError, Layout, ModelConfig
from tests.model.shapes import SHAPES, WIDE, random_weights
from tests.trainer.batches import plain_model

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def outcome(config: ModelConfig, lengths: list[int], dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Log-probs of every token but the first of each sequence, and the gradients of a weighted sum of them."""
    model = plain_model(config, {p.name: w for p, w in random_weights(config)}, dtype).to(device)
    model.table = tuple(t.to(device) for t in model.table)
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (sum(lengths),), generator=random)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows = torch.tensor([t for t in range(len(ids)) if t not in starts])
    temperatures, weights = (0.5 + torch.rand(len(rows), generator=random) for _ in range(2))
    layout = Layout.packed(lengths, [1] * len(lengths), device)
    groups = starts - torch.arange(len(starts))
    given = (t.to(device) for t in (rows, groups, temperatures))
    logprobs = model(ids.to(device), layout, *given)
    (logprobs * weights.to(device)).sum().backward()
    return {"logprobs": logprobs.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [[24, 24, 24], [5, 40, 1, 17]], ids=["alike", "mixed"])
def test_fast_is_close_and_not_equal(lengths: list[int], device: str) -> None:
    config, dtype = (WIDE, torch.bfloat16) if device == "cuda" else (SHAPES["tiny"], torch.float32)
    exact, fast = (outcome(replace(config, numerics=n), lengths, dtype, device) for n in ("exact", "fast"))
    assert exact.keys() == fast.keys()
    limit = 0.05 if dtype == torch.bfloat16 else 1e-4
    for name, a in exact.items():
        error = ((fast[name] - a).norm() / a.norm()).item()
        assert error < limit, (name, error)
    assert not same_bits(exact["logprobs"], fast["logprobs"])


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match="numerics=fat must be one of exact, fast"):
        replace(WIDE, numerics="fat")
