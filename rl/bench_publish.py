"""`python -m rl.bench_publish`: times publications and sleeps (kernels/bench/publication.py)."""

from kernels.bench.publication import main
from kernels.host.command import interruptible
from rl.cluster import left_at_once

if __name__ == "__main__":
    with left_at_once(), interruptible():
        main()
