"""Weights from the trainer to the engines, bucket by bucket: a trainer rank sends its rows, a rollout rank receives its shard.

The next bucket is packed while the last one is taken. Nothing is served before all engines hold what all trainer ranks serve,
by the fingerprints of both sides; where that fails, or a rank does, every engine goes on with the weights it had. What is then
served is compared once more after the commit, and before every evaluation (`check_served`; a step's own tokens are compared by
`align`): where that fails no engine has weights any more.
"""

import hashlib
import uuid
from collections.abc import Callable, Sequence

from kernels.model import served
from kernels.weights.fingerprint import unsigned
from rl.cluster import RolloutFleet, TrainerFleet
from rl.cluster.calls import gather
from rl.errors import RunError

HALF = 256 * 2**20
"""Bytes of half a bucket: what a publication takes on a card is twice that for every trainer rank there."""

Progress = Callable[[int, int], None]
"""(buckets done, of how many)."""


def publish(
    trainer: TrainerFleet,
    rollout: RolloutFleet,
    version: int,
    progress: Progress = lambda done, of: None,
    half: int = HALF,
) -> str:
    """Makes all engines serve the trainer's weights as `version`. Returns the SHA-256 over the fingerprints of all
    parameters, the same for every layout. RunError where one received other bits; whatever fails before the commit, they serve
    what they served before."""
    try:
        return _publish(trainer, rollout, version, progress, half)
    except BaseException:
        rollout.abandon()
        trainer.cut()
        raise


def _publish(trainer: TrainerFleet, rollout: RolloutFleet, version: int, progress: Progress, half: int) -> str:
    name = uuid.uuid4().hex
    tickets, counts = zip(*trainer.begin_publication(name, rollout.receivers, half), strict=True)
    rollout.begin_publication(name, tickets, half)
    far = any(ticket.place != receiver.place for ticket in tickets for receiver in rollout.receivers)
    progress(0, max(counts))
    gather(trainer.packing(0), patience=trainer.patience)
    for number in range(total := max(counts)):
        pending = trainer.sending(number) if far else {}
        pending |= rollout.taking(number)
        if number + 1 < total:
            pending |= trainer.packing(number + 1)
        gather(pending, patience=trainer.patience)
        progress(number + 1, total)
    sent = _added(trainer.end_publication())
    _compare(rollout, rollout.received(), sent, f"received other weights than the trainer sent as version {version}")
    rollout.commit(version)
    rollout.published = sent
    check_served(rollout)
    return _digest(rollout, sent)


def check_served(rollout: RolloutFleet) -> None:
    """Raises RunError where an engine would sample from other bits than the trainer's forward pass reads: names the rank and
    the parameter. No engine serves anything then."""
    if rollout.published is None:
        raise RunError("the engines were given no weights yet")
    try:
        _compare(rollout, rollout.served(), rollout.published, "serves other weights than the trainer")
    except RunError:
        rollout.published = None
        rollout.withdraw()
        raise


def _compare(rollout: RolloutFleet, found: Sequence[Sequence[int]], sent: list[list[int]], what: str) -> None:
    """`found`: [receiver][parameter]; `sent`: [parameter][shard]."""
    for receiver, held in zip(rollout.receivers, found, strict=True):
        for parameter, mine, theirs in zip(served(rollout.model), sent, held, strict=True):
            if mine[receiver.shard] != theirs:
                raise RunError(
                    f"{receiver.name} {what}: {parameter.name} (fingerprint {theirs:016x}, the trainer's "
                    f"{mine[receiver.shard]:016x}); it is not served"
                )


def _added(parts: list[list[list[int]]]) -> list[list[int]]:
    """[parameter][shard]: the sums over the trainer's ranks."""
    return [[unsigned(sum(shard)) for shard in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]


def _digest(rollout: RolloutFleet, sent: list[list[int]]) -> str:
    lines = []
    for parameter, shards in zip(served(rollout.model), sent, strict=True):
        whole = shards[0] if parameter.axis is None else unsigned(sum(shards))
        lines.append(f"{parameter.name} {whole:016x}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
