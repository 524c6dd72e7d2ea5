"""An allocation that fails, as each library says it, becomes one line with what to lower and by how much."""

import pytest
import ray.exceptions
from ray.exceptions import RayTaskError

from kernels.host.failures import OutOfMemory as NoMemory
from kernels.host.failures import RankLost
from rl.cluster.calls import root_cause
from rl.compose import check
from rl.config import RunConfig
from rl.errors import RunError
from rl.memory import OutOfMemory, advised
from rl.model import model_config
from rl.plan import Plan, make_plan


def plan_of(*overrides: str) -> tuple[RunConfig, Plan]:
    config = check(["+recipe=grpo_qwen3_8b", "trainer.world_size=4", *overrides])[0]
    return config, make_plan(config, model_config(config, None), 512)


def line(name: str, asked: int, free: int, *overrides: str) -> str:
    with pytest.raises(RunError) as error, advised(*plan_of(*overrides)):
        raise OutOfMemory(name, asked, free)
    assert not isinstance(error.value, OutOfMemory) and "\n" not in str(error.value)
    return str(error.value)


def test_it_outranks_what_it_breaks() -> None:
    broken = ("trainer rank 0", RayTaskError("step", "", RankLost("gloo: Connection closed by peer")))
    error = root_cause([broken, ("trainer rank 1", RayTaskError("step", "", NoMemory(8 << 30, 0)))])
    assert isinstance(error, OutOfMemory) and error.name == "trainer rank 1"
    assert str(error).startswith("trainer rank 1 ran out of memory: 8.0 GiB asked for, ")
    assert 0 <= error.free < 1 << 45


def test_ray_that_kills_for_memory() -> None:
    error = root_cause(
        [("trainer rank 1", ray.exceptions.OutOfMemoryError("Task was killed: node running low on memory"))]
    )
    assert isinstance(error, OutOfMemory)
    assert str(error) == "trainer rank 1 ran out of memory"


def test_the_trainer_is_told_what_frees_enough() -> None:
    """By the plan, and as much as the shortage takes: 16 leaves hold hundreds of GiB of activations."""
    base = ("trainer.micro_tokens=null", "trainer.checkpointing=none", "trainer.offload=none")
    text = line("trainer rank 1", 2**30, 0, *base, "trainer.micro_leaves=16")
    assert text.startswith(
        "trainer rank 1 ran out of memory: 1.0 GiB asked for, 0 MiB free; lower trainer.micro_leaves "
    )
    for asked, micro in ((2, 8), (250, 4), (400, 1)):
        text = line("trainer rank 1", asked << 30, 0, *base, "trainer.micro_leaves=16")
        assert f"lower trainer.micro_leaves from 16 to {micro}, which frees" in text
    assert "set trainer.checkpointing from none to selective, which frees" in line("trainer rank 0", 2**30, 0, *base)
    assert "raise trainer.world_size from 4 to 8, which frees" in line("trainer rank 0", 2**30, 0, *base)
    assert line("trainer rank 0", 2**30, 0).endswith(" (no bit of the run changes)")


def test_fewer_gradients_wait_where_micro_batches_are_larger() -> None:
    layout = (
        "trainer.world_size=1",
        "trainer.micro_tokens=null",
        "trainer.micro_leaves=1",
        "trainer.checkpointing=layer",
    )
    assert "raise trainer.micro_leaves from 1 to 2, which frees 30.5 GiB" in line(
        "trainer rank 0", 30 << 30, 0, *layout
    )


def test_the_engine_lowers_its_pages() -> None:
    config, plan = plan_of()
    page = plan.kv_bytes // config.rollout.pages
    text = line("rollout engine 0 rank 1", 100 * page, 60 * page)
    assert f"lower rollout.pages from {config.rollout.pages} to {config.rollout.pages - 50}, which frees" in text
    assert "rollout.max_batch_tokens from 8192 to 4096" in text


def test_a_card_may_be_another_programs() -> None:
    for name in ("trainer rank 0", "rollout engine 0 rank 1"):
        assert "end what else uses the card, as nvidia-smi lists it, (no bit" in line(name, 2**20, 0, "device=cuda")
        assert "nvidia-smi" not in line(name, 2**20, 0, "device=cpu")


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), advised(*plan_of()):
        raise KeyError
