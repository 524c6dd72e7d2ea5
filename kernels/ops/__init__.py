"""Every operation that decides a bit. One folder an op: the public function with its autograd rule (`__init__`), the
implementation of each device and family of cards (`cpu.py` over `cpu.c`; `hopper`, `portable`), and its spec."""

from kernels.ops.adamw import adamw
from kernels.ops.add_bias import add_bias
from kernels.ops.attention import attention
from kernels.ops.combine import Mixture, combine, combine_add_norm
from kernels.ops.dispatch import dispatch, gather, route_and_dispatch
from kernels.ops.embedding import embedding
from kernels.ops.exp import exp
from kernels.ops.experts import expert_matmul, gated_experts
from kernels.ops.logprob import linear_logprob, vocab_logprob, vocab_nodes
from kernels.ops.low_rank import low_rank_gradients, merge_low_rank, with_low_rank_gradient
from kernels.ops.low_rank.experts import with_expert_low_rank_gradient
from kernels.ops.matmul import matmul
from kernels.ops.matmul_fp8 import matmul_fp8
from kernels.ops.norm_rope import cos_sin, norm_rope, rope_table
from kernels.ops.normal import normal
from kernels.ops.quantize import Quantized, dequantize_blocks, quantize_blocks, quantize_rows
from kernels.ops.reduce import fold_rows, square_rows, sum_rows
from kernels.ops.rms_norm import add_rms_norm, rms_norm
from kernels.ops.route import route
from kernels.ops.sample import gumbel_argmax
from kernels.ops.store_rows import store_rows
from kernels.ops.swiglu import swiglu
from kernels.ops.truncate import Truncation, exclude_padding, kept_tokens, truncate
