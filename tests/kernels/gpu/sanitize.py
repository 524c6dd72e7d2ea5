"""Every GPU kernel once, on small and odd shapes, for compute-sanitizer:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.kernels.gpu.sanitize

Without the caching allocator every tensor is an allocation of its own, so that one element past its end is an error.
"""

import sys
from time import perf_counter

import torch

from tests.kernels.gpu.calls import generator, not_launched, small


def main() -> int:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    failed = []
    for name, call in small("hopper").items():
        start = perf_counter()
        outputs = call(generator(name))
        torch.cuda.synchronize()
        nan = sum(bool(t.isnan().any()) for t in outputs if t.is_floating_point())
        failed += [name] * bool(nan)
        print(f"{perf_counter() - start:6.2f} s  {name}{'  NaN' * bool(nan)}", flush=True)
    missing = not_launched("hopper")
    print(f"not launched: {missing}" if missing else "every kernel was launched", flush=True)
    return 1 if missing or failed else 0


if __name__ == "__main__":
    sys.exit(main())
