"""Weights from the trainer to the engines, bucket by bucket: a trainer rank sends its rows, a rollout rank receives its shard.

The next bucket is packed while the last one is taken. On its way to another host a byte crosses the network once, however many
engines there are (`kernels.weights.routes`). Nothing is served before all engines hold what all trainer ranks serve,
by the fingerprints of both sides; where that fails, or a rank does, every engine goes on with the weights it had. What is then
served is compared once more after the commit, and before every evaluation (`check_served`; a step's own tokens are compared by
`align`): where that fails no engine has weights any more.
"""

import hashlib
import uuid
from collections.abc import Callable, Sequence

from kernels.host.place import Place
from kernels.model import served
from kernels.weights.bucket import Ticket
from kernels.weights.cargo import Kind, factors_are_less
from kernels.weights.fingerprint import unsigned
from kernels.weights.routes import Recipient, Way, serving, way
from rl.cluster import RolloutFleet, TrainerFleet
from rl.cluster.calls import gather
from rl.errors import RunError

HALF = 256 * 2**20
"""Bytes of half a bucket: what a publication takes on a card is twice that for every trainer rank there."""
FAR = 64 * 2**20
"""The same where bytes cross a network: from 27 MB/s on, eight ranks' buckets take less than the 20 s after which an end is
taken to be gone."""
_LEAST = 1 << 20

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
    rollout.crossed, rollout.packed = {}, 0
    kind: Kind = "factors" if _sends_factors(trainer, rollout) else "weights"
    if kind == "factors" and not rollout.founded:
        _carry(trainer, rollout, "frozen", progress, half)
        rollout.keep()
        rollout.founded = True
    sent = _carry(trainer, rollout, kind, progress, half)
    _compare(rollout, rollout.received(), sent, f"received other weights than the trainer sent as version {version}")
    rollout.commit(version)
    rollout.published = sent
    check_served(rollout)
    return _digest(rollout, sent)


def _sends_factors(trainer: TrainerFleet, rollout: RolloutFleet) -> bool:
    """Says whether A and B are sent in the place of the weights that they change."""
    model = trainer.model
    if model is None or model.adapter is None or trainer.sends == "weights":
        return False
    return trainer.sends == "factors" or (_over_hosts(trainer, rollout) and factors_are_less(model, trainer.dtype))


def _carry(trainer: TrainerFleet, rollout: RolloutFleet, kind: Kind, progress: Progress, half: int) -> list[list[int]]:
    """Brings what is to be carried to all engines; returns the fingerprints of what the trainer serves: [parameter][shard]."""
    tickets, total, late = _begin(trainer, rollout, half, kind)
    far = any(ticket.place != to.place for ticket in tickets for to in rollout.recipients)
    progress(0, total)
    gather(trainer.packing(0), patience=trainer.patience)
    for number in range(total + late):
        pending = trainer.sending(number) if far else {}
        pending |= rollout.taking(number)
        if number + 1 < total:
            pending |= trainer.packing(number + 1)
        gather(pending, patience=trainer.patience)
        progress(min(number + 1, total), total)
    return _end(trainer, rollout)


def _replicas(trainer: TrainerFleet) -> list[Sequence[Place]]:
    size = len(trainer.places) // trainer.replicas
    return [trainer.places[i : i + size] for i in range(0, len(trainer.places), size)]


def _over_hosts(trainer: TrainerFleet, rollout: RolloutFleet) -> bool:
    """Says whether an engine is on another host than one of the ranks that serve it."""
    replicas = _replicas(trainer)
    pairs = zip(rollout.recipients, serving(replicas, rollout.recipients), strict=True)
    return any(source.host != to.place.host for to, g in pairs for source in replicas[g])


def _begin(trainer: TrainerFleet, rollout: RolloutFleet, half: int, kind: Kind) -> tuple[Sequence[Ticket], int, bool]:
    """Begins a publication on both sides; returns the trainer's tickets, how many buckets there are, and whether some are taken
    a bucket late, since another rank of the host passes them on."""
    name, recipients = uuid.uuid4().hex, rollout.recipients
    size, replicas = len(trainer.places) // trainer.replicas, _replicas(trainer)
    by = serving(replicas, recipients)
    companies = [[to for to, replica in zip(recipients, by, strict=True) if replica == g] for g in range(len(replicas))]
    follow = {
        to.name: found.relay.name
        for to, g in zip(recipients, by, strict=True)
        for found in [_late(replicas[g], to, companies[g])]
        if found and found.relay
    }
    shards = 1 + max(to.shard for to in recipients)
    if _over_hosts(trainer, rollout):
        half = min(half, FAR)
    if follow:  # who passes on holds its shard of a bucket of every rank elsewhere
        half = min(half, max(half * shards // size // 16 * 16, _LEAST))
    tickets, counts = zip(*trainer.begin_publication(name, companies, shards, half, kind), strict=True)
    parts = [tickets[i : i + size] for i in range(0, len(tickets), size)]
    served_by = [(parts[g], companies[g]) for g in by]
    passed_on = rollout.begin_publication(name, served_by, half, kind, trainer.model)
    rollout.follow({name: passed_on[relay] for name, relay in follow.items()})
    return tickets, max(counts), bool(follow)


def _late(replica: Sequence[Place], to: Recipient, company: Sequence[Recipient]) -> Way | None:
    """Returns the way by which `to` reads what another rank of its place passes on, if there is one."""
    ways = (way(source, to, company) for source in replica)
    return next((found for found in ways if found.relay and found.shared), None)


def _end(trainer: TrainerFleet, rollout: RolloutFleet) -> list[list[int]]:
    """Returns what the trainer's ranks serve together: [parameter][shard]. RunError where its replicas do not hold the same."""
    sent = trainer.end_publication()
    size = len(sent) // trainer.replicas
    first, *others = [_added([part.sums for part in sent[i : i + size]]) for i in range(0, len(sent), size)]
    for number, other in enumerate(others, 1):
        for parameter, mine, theirs in zip(served(rollout.model), first, other, strict=True):
            if mine != theirs:
                raise RunError(f"replica {number} of the trainer holds other weights than replica 0: {parameter.name}")
    rollout.packed += sum(part.packed for part in sent)
    for part in sent:
        for way_, size in part.crossed.items():
            rollout.crossed[way_] = rollout.crossed.get(way_, 0) + size
    return first


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
    for receiver, held in zip(rollout.recipients, found, strict=True):
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
