"""Weights from the trainer to the engines, bucket by bucket: a trainer rank sends its rows, a rollout rank receives its shard.

The next bucket is packed while the last one is taken. Nothing is served before all engines hold what all trainer ranks sent, by
the fingerprints of both sides; where that fails, or a rank does, every engine goes on with the weights it had.
"""

import hashlib
import uuid
from collections.abc import Callable

from kernels.model import served
from kernels.weights.fingerprint import unsigned
from rl.cluster import RolloutFleet, TrainerFleet, gather
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
    """All engines serve the trainer's weights as `version` after this. Returns the SHA-256 over the fingerprints of all
    parameters, the same for every layout. RunError where one received other bits; whatever fails,
    they serve what they served before."""
    try:
        return _publish(trainer, rollout, version, progress, half)
    except BaseException:
        rollout.abandon()
        trainer.cut()
        raise


def _publish(trainer: TrainerFleet, rollout: RolloutFleet, version: int, progress: Progress, half: int) -> str:
    name = uuid.uuid4().hex
    tickets, counts = zip(*trainer.call("begin_publication", name, rollout.receivers, half), strict=True)
    rollout.call("begin_publication", name, list(tickets), half)
    far = any(ticket.card != receiver.card for ticket in tickets for receiver in rollout.receivers)
    progress(0, max(counts))
    trainer.call("pack", 0)
    for number in range(total := max(counts)):
        pending = trainer.started("send", number) if far else {}
        pending |= rollout.started("take", number)
        if number + 1 < total:
            pending |= trainer.started("pack", number + 1)
        gather(pending)
        progress(number + 1, total)
    names = [p.name for p in served(rollout.model)]
    sent = _added(trainer.call("end_publication"))
    for receiver, held in zip(rollout.receivers, rollout.call("received"), strict=True):
        for name, mine, theirs in zip(names, sent, held, strict=True):
            if mine[receiver.shard] != theirs:
                raise RunError(
                    f"{receiver.name} received other weights than the trainer sent as version {version}: {name} "
                    f"(fingerprint {theirs:016x}, sent {mine[receiver.shard]:016x}); version {version} is not served"
                )
    rollout.call("commit", version)
    return _digest(rollout, sent)


def _added(parts: list[list[list[int]]]) -> list[list[int]]:
    """[parameter][shard]: the sums over the trainer's ranks."""
    return [[unsigned(sum(shard)) for shard in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]


def _digest(rollout: RolloutFleet, sent: list[list[int]]) -> str:
    lines = []
    for parameter, shards in zip(served(rollout.model), sent, strict=True):
        whole = shards[0] if parameter.axis is None else unsigned(sum(shards))
        lines.append(f"{parameter.name} {whole:016x}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
