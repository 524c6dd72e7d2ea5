"""The estimate of memory against what the tensors take."""

import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from kernels.host.place import HOST
from kernels.model import ModelConfig, known, saved
from rl.cluster.nodes import this_node
from rl.compose import check
from rl.config import RunConfig
from rl.errors import UserError
from rl.model import model_config
from rl.placement import Node, place
from rl.plan import Plan, _check_cards, _check_disk, check_machine, make_plan
from trainer.batch import BatchError
from trainer.checkpoint import folder_name


def plan_of(*overrides: str, prompt: int = 64) -> tuple[Plan, ModelConfig]:
    config = check(list(overrides))[0]
    model = model_config(config, None)
    return make_plan(config, model, prompt), model


def elements(model: ModelConfig, part: str = "") -> int:
    total = 0
    for p in saved(model):
        rows = sum(p.sections)
        total += rows * (p.columns or 1) if part in p.name else 0
    return total


@pytest.mark.parametrize("recipe", ["grpo_qwen3_8b", "grpo_qwen3_0p6b", "grpo_qwen3_30b_a3b"])
def test_weights_and_pages(recipe: str) -> None:
    plan, model = plan_of(f"+recipe={recipe}")
    config = check([f"+recipe={recipe}"])[0]
    assert plan.parameters == elements(model)
    assert plan.weights_bytes == 2 * elements(model) // config.rollout.tp
    tokens = config.rollout.pages * config.rollout.page_size
    assert plan.kv_tokens == tokens
    assert plan.kv_bytes == 2 * 2 * model.layers * tokens * (model.kv_heads // config.rollout.tp) * model.head_dim


@pytest.mark.parametrize("recipe", ["grpo_qwen3_8b", "grpo_qwen3_0p6b", "grpo_qwen3_30b_a3b"])
def test_trainer_state(recipe: str) -> None:
    """Masters and two moments, where they are said to be; a tied head is held twice, and has no moments."""
    world = check([f"+recipe={recipe}"])[0].trainer.world_size
    for offload, device, host in (("none", 12, 0), ("optimizer", 4, 8), ("all", 0, 16)):
        plan, model = plan_of(f"+recipe={recipe}", f"trainer.offload={offload}", "trainer.micro_leaves=1")
        table = model.vocab_size * model.hidden_size if model.tied else 0
        assert plan.trainer.state == pytest.approx((device * elements(model) + 4 * table * (device > 0)) / world)
        if offload != "all":
            assert plan.trainer.host == pytest.approx(host * elements(model) / world)
    half, model = plan_of(f"+recipe={recipe}", "trainer.moments=bfloat16", "trainer.offload=optimizer")
    assert half.trainer.host == pytest.approx(4 * elements(model) / world)


def test_a_token_budget() -> None:
    """Micro-batches at full length, and a budget that one leaf could exceed is refused before anything starts."""
    base = ["model.hf.vocab_size=64", "warmup.steps=0", "trainer.leaf_sequences=4", "algorithm.prompts_per_step=16"]
    leaf = 4 * (64 + check(base)[0].rollout.max_new_tokens)
    for leaves, count in ((1, 16), (3, 8), (4, 4), (99, 1)):
        plan, _ = plan_of(*base, "algorithm.group_size=8", f"trainer.micro_tokens={leaf * leaves}")
        assert plan.micro_batches == count
    with pytest.raises(
        BatchError, match=rf"micro_tokens={leaf - 1} is below one leaf: .*=4 sequences of up to {leaf // 4} "
    ):
        plan_of(*base, f"trainer.micro_tokens={leaf - 1}")


def test_what_saves_memory_does(recipe: str = "grpo_qwen3_8b") -> None:
    base = (
        f"+recipe={recipe}",
        "trainer.micro_tokens=null",
        "trainer.micro_leaves=4",
        "trainer.checkpointing=none",
        "trainer.offload=none",
    )
    peaks = [plan_of(*base, *more)[0].trainer.peak for more in (
        (), ("trainer.checkpointing=selective",), ("trainer.checkpointing=layer",),
        ("trainer.checkpointing=layer", "trainer.offload=optimizer"), ("trainer.checkpointing=layer", "trainer.offload=all"),
    )]  # fmt: skip
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)


def on_cards(config: RunConfig, plan: Plan, sizes: list[int], host: str = HOST) -> None:
    node = Node(host, tuple(range(len(sizes))), card_bytes=tuple(sizes))
    _check_cards(config, plan, place(config, [node]), node)


def test_a_card_too_small_is_refused_with_all_numbers() -> None:
    """Colocated sides take turns; split ones have a card each."""
    base = ["+recipe=grpo_qwen3_8b", "trainer.world_size=1", "rollout.tp=1", "rollout.replicas=1"]
    for placement, cards in (("colocated", [80 << 30]), ("split", [80 << 30, 80 << 30])):
        config = check([*base, f"cluster.placement={placement}"])[0]
        plan = make_plan(config, model_config(config, None), 512)
        assert plan.trainer.peak > 200 << 30  # many micro-batches: gradients wait
        with pytest.raises(
            UserError, match=rf"^card 0 has 80.0 GiB and 1 trainer rank.*GiB there \({placement}\): set "
        ):
            on_cards(config, plan, cards)
        on_cards(config, plan, [400 << 30] * len(cards))
    config = check([*base, "algorithm.prompts_per_step=2", "cluster.placement=colocated", "rollout.pages=2048"])[0]
    plan = make_plan(config, model_config(config, None), 512)
    turns = max(plan.trainer_bytes, plan.rollout_bytes) + (2 << 30)
    on_cards(config, plan, [turns])
    with pytest.raises(UserError, match="card 0 has"):
        on_cards(config, plan, [turns - (3 << 30)])


def test_rounded_moments_must_be_able_to_decay() -> None:
    with pytest.raises(UserError, match=r"trainer.moments=bfloat16 with trainer.betas\[1\]=0.999: above 0.99"):
        plan_of("model.hf.vocab_size=64", "trainer.moments=bfloat16", "trainer.betas=[0.9,0.999]")


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
            check_machine(check(overrides)[0], plan_of(*overrides)[0], [this_node("cpu")])


def test_disk_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One checkpoint more than stay; those that an earlier part of the run left will go, but no more than stay."""
    config = check(["model.hf.vocab_size=64", "checkpoint.keep=2", f"out_dir={tmp_path / 'runs' / 'new'}"])[0]
    plan = make_plan(config, model_config(config, None), 64)
    assert plan.checkpoint_bytes == 12 * plan.parameters
    assert plan.disk_bytes == 3 * plan.checkpoint_bytes + 4 * plan.parameters
    for there, need in ((0, 3), (1, 2), (2, 1), (5, 1)):
        for step in range(there):
            (tmp_path / "runs/new/checkpoints" / folder_name(step)).mkdir(parents=True, exist_ok=True)
        enough = need * plan.checkpoint_bytes + 4 * plan.parameters
        for free in (enough, enough - 1):
            monkeypatch.setattr("rl.plan.shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            refused = pytest.raises(UserError, match=rf"of disk and .* is free at {tmp_path}.*: lower checkpoint.keep")
            with nullcontext() if free == enough else refused:
                _check_disk(config, plan)


def test_a_plan_of_very_many_sequences_is_made_at_once() -> None:
    """As many as one step may have; more are refused."""
    many = ("+recipe=grpo_qwen3_0p6b", "algorithm.group_size=64", "algorithm.prompts_per_step=")
    start = time.perf_counter()
    assert plan_of(*many[:2], f"{many[2]}{2**20}")[0].micro_batches == 2**26 // 8
    assert time.perf_counter() - start < 60
    with pytest.raises(UserError, match="67,108,928 sequences in one step are above 67,108,864"):
        plan_of(*many[:2], f"{many[2]}{2**20 + 1}")


@pytest.mark.parametrize(("name", "shape"), [*known.ON_CARDS.items(), ("qwen3_0p6b", known.QWEN3_0P6B)])
def test_known_shapes_are_those_of_the_configs(name: str, shape: ModelConfig) -> None:
    assert model_config(check([f"model={name}"])[0], None) == shape
