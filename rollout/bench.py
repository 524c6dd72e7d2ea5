"""`python -m rollout.bench`: times the engine (kernels/bench/serving.py)."""

from kernels.bench.serving import main
from kernels.host.command import interruptible

if __name__ == "__main__":
    with interruptible():
        main()
