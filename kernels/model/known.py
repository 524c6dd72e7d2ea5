"""The shapes of known models, for benchmarks, tests and a server without a model. `configs/model/` has them for users; a
test compares the two."""

from dataclasses import replace

from kernels.model.config import ModelConfig
from kernels.model.experts import Experts

QWEN3_8B = ModelConfig(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    max_positions=40960,
    rms_eps=1e-6,
    rope_theta=1e6,
    tied=False,
    leaves=8,
)
QWEN3_0P6B = replace(QWEN3_8B, hidden_size=1024, intermediate_size=3072, layers=28, heads=16, tied=True)
QWEN3_30B_A3B = replace(
    QWEN3_8B,
    hidden_size=2048,
    intermediate_size=6144,
    layers=48,
    kv_heads=4,
    model_type="qwen3_moe",
    experts=Experts(count=128, chosen=8, intermediate_size=768, normalize=True),
)
ON_CARDS = {"qwen3_8b": QWEN3_8B, "qwen3_30b_a3b": QWEN3_30B_A3B}
"""What benchmarks of engine and trainer run on a GPU."""
BENCH = replace(QWEN3_8B, vocab_size=512, max_positions=1024, rope_theta=1e4)
BENCH = replace(BENCH, hidden_size=256, intermediate_size=768, layers=4, heads=8, kv_heads=4, head_dim=32)
"""A small model that a CPU runs in milliseconds."""
TINY_BYTES = replace(BENCH, hidden_size=64, intermediate_size=128, layers=2, kv_heads=8, head_dim=16, init_std=0.2)
TINY_BYTES = replace(TINY_BYTES, vocab_size=288)  # 256 bytes, the end of text, and room to be divisible
"""A model over bytes that needs no files: what is served and verified where no directory is given."""
