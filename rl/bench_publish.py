"""`python -m rl.bench_publish`: times publications and sleeps (kernels/bench/publication.py)."""

from kernels.bench.publication import main
from kernels.host.command import interruptible

if __name__ == "__main__":
    with interruptible():
        main()
