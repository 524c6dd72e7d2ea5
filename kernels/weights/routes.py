"""How bytes get from a trainer rank to every rollout rank, so that each crosses the network once a node.

    same card, or memory of the same host      the recipient opens the rank's bucket
    another card of the same host              a wire
    another host                               a wire to one recipient of that host for each shard, the relay, which passes on
                                               what it got: through a bucket of its own, or over wires between cards

Both sides compute the same from the same places, so nothing is agreed on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.host.place import Place


@dataclass(frozen=True)
class Recipient:
    """Names a rollout rank, as the driver numbers them."""

    name: str
    shard: int  # its tensor-parallel rank
    place: Place


@dataclass(frozen=True)
class Way:
    """Says from whom a recipient gets a rank's bytes, the rank itself or a relay, and whether from memory that both open."""

    relay: Recipient | None
    shared: bool


def way(source: Place, to: Recipient, company: Sequence[Recipient]) -> Way:
    """Returns the way from a trainer rank at `source` to `to`, one of the `company` that this rank's replica serves."""
    if source.host == to.place.host:
        return Way(None, source == to.place)
    relay = next(r for r in company if r.place.host == to.place.host and r.shard == to.shard)
    return Way(None, False) if relay.name == to.name else Way(relay, relay.place == to.place)


def wired(source: Place, company: Sequence[Recipient]) -> list[Recipient]:
    """Lists those to whom a rank at `source` sends over wires of its own."""
    return [to for to in company if way(source, to, company) == Way(None, False)]


def followers(
    relay: Recipient, sources: Sequence[Place], company: Sequence[Recipient], shared: bool
) -> list[Recipient]:
    """Lists those to whom `relay` passes on what comes from other hosts: by memory (`shared`), or over wires."""
    far = [s for s in sources if s.host != relay.place.host]
    return [to for to in company if far and way(far[0], to, company) == Way(relay, shared)]


def serving(replicas: Sequence[Sequence[Place]], recipients: Sequence[Recipient]) -> list[int]:
    """Returns for each recipient the number of the trainer's replica that serves it: one with most ranks at its place, then on
    its host; where that leaves several, its hosts take turns."""
    hosts = list(dict.fromkeys(r.place.host for r in recipients))

    def near(replica: Sequence[Place], to: Recipient) -> tuple[int, int]:
        return sum(p == to.place for p in replica), sum(p.host == to.place.host for p in replica)

    out = []
    for to in recipients:
        nearest = max(near(replica, to) for replica in replicas)
        equal = [i for i, replica in enumerate(replicas) if near(replica, to) == nearest]
        out.append(equal[hosts.index(to.place.host) % len(equal)])
    return out
