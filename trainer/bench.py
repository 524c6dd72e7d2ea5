"""`python -m trainer.bench`: times forward and backward (kernels/bench/training.py)."""

from kernels.bench.training import main
from kernels.host.command import interruptible

if __name__ == "__main__":
    with interruptible():
        main()
