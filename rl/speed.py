"""Measures how fast a step was: tokens a second, and the share of the cards' arithmetic that the model's own products account
for."""

from collections.abc import Callable, Mapping
from typing import Any

from kernels.model import ModelConfig, costs
from rollout.drafts.speculation import Counts
from trainer.batch import Batch

PEAK_FLOPS = 989.4e12
"""Of one H100 or H200 (SXM) in bfloat16 without sparsity, from NVIDIA's data sheet: the GPUs that the kernels are for."""


def speeds(
    model: ModelConfig, batch: Batch, metrics: Mapping[str, Any], epochs: int, ranks: int, on_gpu: bool
) -> dict[str, float]:
    """Returns `speed/*` of a step. `metrics`: the seconds of it (`time/step`) and of its phases `time/train` and, where it
    sampled, `time/sample`, and how many tokens it drew where these are not those of its batch; `epochs`: in which the batch
    was trained on; `ranks`: of the trainer. MFU (Chowdhery et al. 2022, appendix B) on a GPU alone."""
    flops = epochs * costs.training_flops(model, batch.lengths) / (metrics["time/train"] * ranks)
    out = {
        "speed/train_tokens_per_s": epochs * len(batch.token_ids) / metrics["time/train"],
        "speed/step_tokens_per_s": len(batch.token_ids) / metrics["time/step"],  # of prompts and responses
        "speed/train_tflops_per_rank": flops / 1e12,
    }
    if seconds := metrics.get("time/sample"):
        out["speed/sample_tokens_per_s"] = metrics.get("sampling/tokens_drawn", len(batch.rows)) / seconds
    return out | ({"speed/train_mfu": flops / PEAK_FLOPS} if on_gpu else {})


class Drafting:
    """Measures what drafted tokens brought the engines since it was asked last."""

    def __init__(self, counts: Callable[[], Counts]) -> None:
        """`counts`: of all engines, since they began."""
        self._counts, self._before = counts, Counts()

    def __call__(self) -> dict[str, float]:
        """Returns `speed/*`."""
        before, now = self._before, self._counts()
        self._before = now
        drafted, draws = now.drafted - before.drafted, now.draws - before.draws
        return {
            "speed/drafted_tokens": drafted,
            "speed/drafts_accepted_frac": (now.accepted - before.accepted) / max(drafted, 1),
            "speed/drafted_step_tokens": (now.tokens - before.tokens) / draws if draws else 1.0,
            "speed/drafts_saved_s": now.seconds_saved - before.seconds_saved,
        }
