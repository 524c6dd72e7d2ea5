"""`python -m kernels.collectives.bench`: times the tree's sums beside NCCL's (kernels/bench/collectives.py)."""

from kernels.bench.collectives import main
from kernels.host.command import interruptible

if __name__ == "__main__":
    with interruptible():
        main()
