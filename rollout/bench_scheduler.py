"""`python -m rollout.bench_scheduler`: times the schedule (kernels/bench/schedule.py)."""

import sys

from kernels.bench.schedule import main
from kernels.host.command import interruptible

if __name__ == "__main__":
    with interruptible():
        sys.exit(main())
