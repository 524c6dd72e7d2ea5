"""Whole steps of a small engine and a small trainer in this process: further rounds of sampling, several updates on a batch, a
learning rate that falls. One digest, however the trainer cuts its batches and wherever the run was stopped."""

import pytest
from torch.distributed.device_mesh import DeviceMesh

from tests.rl.in_process import STEPS, Run, plain

UPDATES = ("algorithm.mini_batches=2", "algorithm.update_epochs=2")
KEYS = (
    *UPDATES,
    "algorithm.sampling_rounds=3",
    "trainer.lr_schedule=cosine",
    "trainer.lr_warmup_steps=1",
    "trainer.lr=1e-3",
)


@pytest.mark.parametrize(
    "keys",
    [
        ("algorithm=grpo", "algorithm.kl_in=loss", "algorithm.kl_estimator=k3"),
        ("algorithm=reinforce_plus_plus", "algorithm.kl_in=reward", "algorithm.kl_estimator=k1"),
    ],
    ids=["loss", "reward"],
)
def test_one_digest_with_a_reference(keys: tuple[str, ...], mesh: DeviceMesh) -> None:
    """The reference is the weights that RL began with, also where the run goes on."""
    keys = (*keys, "algorithm.kl_coef=0.5", *UPDATES, "trainer.lr=1e-2")
    whole = Run(mesh, keys, micro_leaves=1)
    told = whole.steps(1, STEPS)
    assert told[0]["policy/kl_ref"] == 0 and told[0]["policy/kl_ref_k1"] == 0, "the policy is the reference at first"
    assert all(metrics["policy/kl_ref"] > 0 and metrics["time/reference"] > 0 for metrics in told[1:])
    cut = Run(mesh, keys, micro_leaves=4)
    before = cut.steps(1, 1)
    rest = Run(mesh, keys, micro_leaves=2, left=cut)
    assert [plain(m) for m in before + rest.steps(2, STEPS)] == [plain(m) for m in told]
    assert rest.digest() == whole.digest()
    free = Run(mesh, (*keys, "algorithm.kl_coef=0"), micro_leaves=1)
    assert "policy/kl_ref" not in free.steps(1, STEPS)[0] and free.digest() != whole.digest()


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_one_digest(name: str, mesh: DeviceMesh) -> None:
    keys = (f"algorithm={name}", *KEYS)
    whole = Run(mesh, keys, micro_leaves=1)
    told = whole.steps(1, STEPS)
    for metrics in told:
        assert metrics["divergence/tokens_nonzero"] == 0 and metrics["divergence/tokens_compared"] > 0
        assert (metrics["policy/updates"], metrics["policy/updates_on_policy"]) == (4, 1)
        assert metrics["off_policy/ratio_min"] < 1 < metrics["off_policy/ratio_max"]
    assert any(metrics["sampling/groups_dropped"] for metrics in told), "every group had a signal"
    assert whole.stream.cursor == sum(8 + metrics["sampling/groups_dropped"] for metrics in told)
    assert [metrics["policy/lr"] for metrics in told] == pytest.approx([1e-3, 1e-3, 5e-4], rel=1e-6)

    cut = Run(mesh, keys, micro_leaves=4)
    before = cut.steps(1, 1)
    rest = Run(mesh, keys, micro_leaves=2, left=cut)
    assert [plain(m) for m in before + rest.steps(2, STEPS)] == [plain(m) for m in told]
    assert rest.digest() == whole.digest()
