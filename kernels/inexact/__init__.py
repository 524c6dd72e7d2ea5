"""The ops that torch has too, as torch has them: cuBLAS, SDPA and flash attention. `numerics=fast` is made of them.

The same signatures, casts and places of rounding as in `kernels.ops`; the order of a sum is the vendor's, so nothing here is
invariant to anything. For benchmarks and contrast runs: what exactness costs, and what becomes of a run without it.
"""

from kernels.inexact.attention import attention
from kernels.inexact.experts import expert_matmul
from kernels.inexact.logprob import linear_logprob
from kernels.inexact.matmul import matmul
