"""The estimate of memory against what the tensors take."""

import pytest

from kernels.model import ModelConfig
from kernels.model.weights import parameters
from rl.compose import check
from rl.errors import UserError
from rl.model import model_config
from rl.plan import Plan, check_machine, make_plan
from trainer.batch import BatchError


def plan_of(*overrides: str, prompt: int = 64) -> tuple[Plan, ModelConfig]:
    config = check(list(overrides))[0]
    model = model_config(config, None)
    return make_plan(config, model, prompt), model


def elements(model: ModelConfig, part: str = "") -> int:
    total = 0
    for p in parameters(model):
        rows = sum(p.sections)
        total += rows * (p.columns or 1) if part in p.name else 0
    return total


@pytest.mark.parametrize("recipe", ["grpo_qwen3_8b", "grpo_qwen3_0p6b"])
def test_weights_and_pages(recipe: str) -> None:
    plan, model = plan_of(f"+recipe={recipe}")
    config = check([f"+recipe={recipe}"])[0]
    assert plan.parameters == elements(model)
    assert plan.weights_bytes == 2 * elements(model) // config.rollout.tp
    tokens = config.rollout.pages * config.rollout.page_size
    assert plan.kv_tokens == tokens
    assert plan.kv_bytes == 2 * 2 * model.layers * tokens * (model.kv_heads // config.rollout.tp) * model.head_dim


@pytest.mark.parametrize("recipe", ["grpo_qwen3_8b", "grpo_qwen3_0p6b"])
def test_trainer_state(recipe: str) -> None:
    """Weights, gradients and two moments in float32, and what is whole for a moment: a layer, the embedding, the head."""
    plan, model = plan_of(f"+recipe={recipe}")
    world = check([f"+recipe={recipe}"])[0].trainer.world_size
    table = model.vocab_size * model.hidden_size
    held = elements(model) + (table if model.tied else 0)
    layer = elements(model, "layers.3.")
    assert plan.trainer_state_bytes == pytest.approx(16 * held / world + 8 * (layer + 2 * table), rel=1e-3)


def test_batch_arithmetic() -> None:
    vocab = "model.hf.vocab_size=64"
    sizes = ["trainer.leaf_sequences=4", "trainer.micro_leaves=2", "trainer.world_size=2", "algorithm.group_size=8"]
    plan, _ = plan_of(vocab, *sizes, "algorithm.prompts_per_step=10", "warmup.sequences=48")
    assert (plan.sequences, plan.micro_batches, plan.warmup_micro_batches) == (80, 5, 3)
    with pytest.raises(BatchError, match=r"72 sequences .* = 16"):
        plan_of(vocab, *sizes, "algorithm.prompts_per_step=9")
    plan, _ = plan_of(vocab, *sizes, "algorithm.prompts_per_step=10", "warmup.sequences=3", "warmup.steps=0")
    assert plan.warmup_micro_batches == 0


def test_length_fits_positions_and_pages() -> None:
    base = ["model.hf.vocab_size=64", "rollout.max_new_tokens=10", "model.hf.max_position_embeddings=32"]
    plan_of(*base, prompt=22)
    with pytest.raises(UserError, match="32 positions"):
        plan_of(*base, prompt=23)
    plan_of(*base, "rollout.pages=4", "rollout.page_size=8", prompt=22)
    with pytest.raises(UserError, match=r"31 tokens of rollout.pages=31 x page_size=1"):
        plan_of(*base, "rollout.pages=31", "rollout.page_size=1", prompt=22)


def test_memory_counts_every_process() -> None:
    """Each of many processes that would fit alone."""
    for override in ("rollout.replicas=100000", "trainer.world_size=65536"):
        overrides = ["model.hf.vocab_size=64", "algorithm.prompts_per_step=8388608", "warmup.steps=0", override]
        with pytest.raises(UserError, match="is free"):
            check_machine(check(overrides)[0], plan_of(*overrides)[0])
