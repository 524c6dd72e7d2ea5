"""What the engine's and the trainer's benchmark share: the model they time, and how."""

import time
from collections.abc import Callable

from kernels.model import ModelConfig

BENCH_MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    layers=4,
    heads=8,
    kv_heads=4,
    head_dim=32,
    max_positions=1024,
    rms_eps=1e-6,
    rope_theta=1e4,
    tied=False,
    leaves=8,
)


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` runs after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]
