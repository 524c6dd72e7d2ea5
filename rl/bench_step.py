"""`python -m rl.bench_step`: times whole steps in four modes (kernels/bench/step.py)."""

from kernels.bench.step import main
from kernels.host.command import interruptible
from rl.cluster import left_at_once

if __name__ == "__main__":
    with left_at_once(), interruptible():
        main()
