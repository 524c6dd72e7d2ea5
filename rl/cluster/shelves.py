"""The files of a run whose nodes do not share its folder: each keeps the shards of its own ranks, and gives what another lacks.

Whether they share it is found out and not configured: the driver writes a file, and every node says whether it sees it. Where
all do (a shared folder, NFS), or where there is one node, nothing of this is needed.
"""

import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kernels.host.place import Place
from rl.cluster.calls import gather
from rl.cluster.shelf import Shelf
from rl.cluster.watch import Rank
from rl.errors import UserError
from trainer.checkpoint import Checkpoint, needed

_LATE = 3.0  # seconds for a file to be seen: NFS may remember for a moment what a folder held


class Shelves:
    """Holds an actor on every node, of which `away` do not see the driver's files."""

    def __init__(self, nodes: Mapping[str, Rank], own: str, away: frozenset[str], root: Path) -> None:
        """`nodes` by address; `own`: of the driver's; `root`: the run's folder."""
        self._nodes, self._own, self.away, self._root = nodes, own, away, root

    def clear(self) -> None:
        """Removes what killed runs left half made on the other nodes."""
        for host in sorted(self.away):
            for folder in (self._root, self._root / "checkpoints"):
                gather({self._nodes[host].actor.clear.remote(str(folder)): self._nodes[host]})

    def finish(self, hosts: Iterable[str], temporary: Path, final: Path, manifest: str) -> None:
        """Gives the shards on these nodes their name; one node after another, since two may share a folder. SaveError names
        the node where it cannot be."""
        for host in sorted({*hosts} & self.away):
            where = str(temporary.absolute()), str(final.absolute())
            gather({self._nodes[host].actor.finish.remote(*where, manifest): self._nodes[host]})

    def prune(self, hosts: Iterable[str], root: Path, newest: str, keep: int) -> None:
        """Removes the older checkpoints of these nodes."""
        for host in sorted({*hosts} & self.away):
            gather({self._nodes[host].actor.prune.remote(str(root.absolute()), newest, keep): self._nodes[host]})

    def supply(self, checkpoint: Checkpoint, wanted: Mapping[str, Iterable[str]]) -> None:
        """Brings to each node (address) the files of a checkpoint that it wants and lacks, from any that has them, by digest.
        UserError names a file that no node has, and who wrote it."""
        where, files = str(checkpoint.folder), {file.name: file for file in checkpoint.shards}
        asked = {node.actor.holds.remote(where, list(files.values())): node for node in self._nodes.values()}
        held = dict(zip(self._nodes, map(frozenset[str], gather(asked)), strict=True))
        calls = {}
        for host, names in wanted.items():
            near = held[self._own] | held[host] if host not in self.away else held[host]
            missing = sorted({*names} - near)
            owners = [self._owner(checkpoint, name, held) for name in missing]
            if missing:
                call = self._nodes[host].actor.bring.remote(
                    where, [files[name] for name in missing], [self._nodes[owner].actor for owner in owners]
                )
                calls[call] = self._nodes[host]
        gather(calls)

    def _owner(self, checkpoint: Checkpoint, name: str, held: Mapping[str, frozenset[str]]) -> str:
        owner = next((host for host, names in held.items() if name in names), None)
        if owner is None:
            raise UserError(lost(checkpoint, [name], f"none of the {len(held)} nodes of this Ray"))
        return owner

    def collect(self, host: str, folder: Path) -> None:
        """Copies a folder to the driver's node from the one whose rank wrote it."""
        if host in self.away:
            own = self._nodes[self._own]
            gather({own.actor.copy_folder.remote(str(folder), self._nodes[host].actor): own})

    def spread(self, folder: Path) -> None:
        """Copies a folder of the run's from the driver's node to all that do not see it, one after another, since two may share
        one; another folder is the user's, who has it on every node."""
        if not folder.is_relative_to(self._root):
            return
        for host in sorted(self.away):
            node = self._nodes[host]
            gather({node.actor.copy_folder.remote(str(folder), self._nodes[self._own].actor): node})

    def close(self) -> None:
        """Ends the actors."""
        for node in self._nodes.values():
            ray.kill(node.actor)


def opened(root: Path, timeout: float) -> Shelves | None:
    """Finds out which nodes of the connected Ray see the files in `root`, a folder of the driver's that is there; returns None
    where all do."""
    nodes = {n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}
    if len(nodes) == 1:
        return None
    own_id = ray.get_runtime_context().get_node_id()
    own = next(host for host, node_id in nodes.items() if node_id == own_id)
    kind = ray.remote(num_cpus=0, max_restarts=0)(Shelf)
    shelves = {}
    for host, node_id in nodes.items():
        there = NodeAffinitySchedulingStrategy(node_id, soft=False)
        actor = kind.options(scheduling_strategy=there, max_concurrency=8).remote()  # it gives while it takes
        shelves[host] = Rank(f"node {host}", actor)
    found = Shelves(shelves, own, _away(shelves, own, root, timeout), root)
    if not found.away:
        found.close()
        return None
    found.clear()
    return found


def _away(shelves: Mapping[str, Rank], own: str, root: Path, timeout: float) -> frozenset[str]:
    """The nodes that do not see what this process writes in `root`."""
    content = uuid.uuid4().hex.encode()
    probe = root / f".seen-{content.decode()}"
    try:
        with open(probe, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        blind = {host: shelf for host, shelf in shelves.items() if host != own}
        until = None
        while blind:
            asked = {shelf.actor.sees.remote(str(probe), content): shelf for shelf in blind.values()}
            answers = gather(asked, timeout)
            blind = {host: shelf for (host, shelf), saw in zip(blind.items(), answers, strict=True) if not saw}
            until = until or time.monotonic() + _LATE  # from the first answers on: actors take long to start
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        return frozenset(blind)
    except OSError as error:
        raise UserError(f"out_dir={root} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def lost(checkpoint: Checkpoint, names: Iterable[str], where: str) -> str:
    """Says which files of a checkpoint are nowhere, and what to do."""
    name, *more = sorted(names)
    others = f" and {len(more)} more" if more else ""
    by = f"; {checkpoint.nodes[name]} wrote it" if name in checkpoint.nodes else ""
    return (
        f"{checkpoint.folder / name}{others} is on {where}{by}: bring that node back (its address may be another), copy the "
        f"file to any node, or name another checkpoint by resume=FOLDER"
    )


def check_here(checkpoint: Checkpoint) -> None:
    """Raises UserError where this machine lacks a file that another node wrote, and no other is there to give it."""
    if gone := [name for name in checkpoint.nodes if not (checkpoint.folder / name).exists()]:
        raise UserError(lost(checkpoint, gone, "no node that is here"))


def supplied(checkpoint: Checkpoint, shelves: Shelves | None, places: Sequence[Place], replicas: int) -> Checkpoint:
    """Sees to it that each trainer rank (`places`, which hold the model `replicas` times) finds the files that it reads;
    returns the checkpoint by its absolute path. UserError where one is nowhere."""
    found = replace(checkpoint, folder=checkpoint.folder.absolute())
    if shelves is None:
        check_here(found)
        return found
    size = len(places) // replicas
    wanted: dict[str, set[str]] = {}
    for rank, place in enumerate(places):
        wanted.setdefault(place.host, set()).update(needed(found, rank % size, size))
    shelves.supply(found, wanted)
    return found
