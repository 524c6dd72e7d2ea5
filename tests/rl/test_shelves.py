"""Files of nodes that share no folder, without Ray: actors are stood for by objects, nodes by folders."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.host.place import Place
from kernels.model import trained
from kernels.weights.reshard import fsdp_rows
from kernels.weights.tensor_file import WrittenFile
from rl.cluster import shelf as shelf_module
from rl.cluster.shelf import Shelf, copy
from rl.cluster.shelves import Shelves, supplied
from rl.cluster.watch import Rank
from rl.errors import UserError
from tests.model.shapes import SHAPES, TINY
from trainer.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    described,
    finish,
    needed,
    read,
    read_rows,
    shard_name,
    verify,
)
from trainer.writer import ShardWriter

STEP = "step-00000007"


class Node:
    """A node's disk, as a folder; what a Shelf does of path `/x` there is done below it."""

    def __init__(self, root: Path) -> None:
        self.root, self.shelf = root, Shelf()

    def __getattr__(self, name: str) -> Any:
        method = getattr(Shelf, name)

        class Remote:
            @staticmethod
            def remote(where: str, *rest: Any) -> Any:
                rest = tuple(str(self.root) + x if isinstance(x, str) and x.startswith("/") else x for x in rest)
                return method(self.shelf, str(self.root) + where, *rest)

        return Remote


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Node]:
    """Three, of which the first is the driver's. A file is asked of a node by the path inside it."""
    out = {f"10.0.0.{i}": Node(tmp_path / str(i)) for i in (1, 2, 3)}
    monkeypatch.setattr("rl.cluster.shelves.gather", lambda calls, *_: list(calls))
    monkeypatch.setattr("rl.cluster.shelves.ray.kill", lambda actor: None)

    def bring(self: Shelf, where: str, files: list[WrittenFile], sources: list[Node]) -> str:
        for file, source in zip(files, sources, strict=True):
            inside = where[len(str(tmp_path)) + 2 :]

            def ask(
                path: str, offset: int, size: int, source: Node = source, inside: str = f"{inside}/{file.name}"
            ) -> bytes:
                return source.shelf.read(f"{source.root}{inside}", offset, size)

            copy(Path(where) / file.name, file, ask)
        return where

    monkeypatch.setattr(Shelf, "bring", bring)
    monkeypatch.setattr(Shelf, "holds", lambda self, where, files: _Held(_holds(self, where, files), where))
    return out


_holds = Shelf.holds


class _Held(tuple):
    """What a node holds, as a key of calls: two nodes may hold the same."""

    def __new__(cls, names: list[str], where: str) -> "_Held":
        made = super().__new__(cls, names)
        made.where = where  # type: ignore[attr-defined]
        return made

    def __hash__(self) -> int:
        return hash(self.where)  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return self is other


def shelves(nodes: dict[str, Node], away: frozenset[str]) -> Shelves:
    return Shelves({host: Rank(f"node {host}", node) for host, node in nodes.items()}, "10.0.0.1", away, Path("/run"))


def saved(nodes: dict[str, Node], hosts: tuple[str, ...]) -> Checkpoint:
    """A checkpoint of which rank i wrote its file on hosts[i]; the driver has the manifest."""
    world, torch_seed, files = len(hosts), torch.Generator().manual_seed(3), []
    whole = {f"weight.{i}": torch.randn(n, 3, generator=torch_seed) for i, n in enumerate((5, 8, 1))}
    for rank, host in enumerate(hosts):
        rows = {k: x[(r := fsdp_rows(len(x), rank, world)).start : r.stop].clone() for k, x in whole.items()}
        writer = ShardWriter()
        writer.start(nodes[host].root / "run" / f".{STEP}.tmp" / shard_name(rank, world), rows)
        made = writer.result(wait=True)
        assert made is not None
        files.append(made)
    away = {shard_name(i, world): host for i, host in enumerate(hosts) if host != "10.0.0.1"}
    manifest = described(TINY, 7, "", files, {"model/config.json": b"{}"}, {"x": 1}, away)
    every = shelves(nodes, frozenset(nodes) - {"10.0.0.1"})
    every.finish(hosts, Path(f"/run/.{STEP}.tmp"), Path(f"/run/{STEP}"), manifest)
    temporary = nodes["10.0.0.1"].root / "run" / f".{STEP}.tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    finish(temporary, nodes["10.0.0.1"].root / "run" / STEP, manifest, {"model/config.json": b"{}"})
    return read(nodes["10.0.0.1"].root / "run" / STEP)


def on_path(checkpoint: Checkpoint) -> Checkpoint:
    """As every node names it."""
    return replace(checkpoint, folder=Path(f"/run/{STEP}"))


def test_each_node_keeps_what_its_ranks_wrote(nodes: dict[str, Node]) -> None:
    found = saved(nodes, ("10.0.0.2", "10.0.0.3"))
    assert found.nodes == {shard_name(0, 2): "10.0.0.2", shard_name(1, 2): "10.0.0.3"}
    kept = {host: {p.name for p in (node.root / "run" / STEP).iterdir()} for host, node in nodes.items()}
    assert kept == {
        "10.0.0.1": {MANIFEST, "model"},
        "10.0.0.2": {MANIFEST, shard_name(0, 2)},
        "10.0.0.3": {MANIFEST, shard_name(1, 2)},
    }
    verify(found, elsewhere=True)
    with pytest.raises(CheckpointError, match=r"rank-0-of-2.safetensors cannot be read: .*\(10\.0\.0\.2 wrote it\)"):
        verify(found)


def test_a_node_gets_what_it_lacks_from_whoever_has_it(nodes: dict[str, Node]) -> None:
    """Ranks come back on other nodes: the one that had rank 1 has rank 0 now, and one has none."""
    found = saved(nodes, ("10.0.0.2", "10.0.0.3"))
    every = shelves(nodes, frozenset({"10.0.0.2", "10.0.0.3"}))
    places = [Place("10.0.0.3"), Place("10.0.0.1")]
    supplied(on_path(found), every, places, 1)
    assert (nodes["10.0.0.3"].root / "run" / STEP / shard_name(0, 2)).exists()
    assert (nodes["10.0.0.1"].root / "run" / STEP / shard_name(1, 2)).exists()
    assert not (nodes["10.0.0.2"].root / "run" / STEP / shard_name(1, 2)).exists(), "it was not asked for"
    supplied(on_path(found), every, [Place("10.0.0.1")], 1)  # one rank reads all of it
    verify(found)
    assert read_rows(found, "weight", "0", 5, 0, 5).shape == (5, 3)


def test_a_shard_that_is_lost_or_altered_is_named(nodes: dict[str, Node]) -> None:
    found = saved(nodes, ("10.0.0.2", "10.0.0.3"))
    every = shelves(nodes, frozenset({"10.0.0.2", "10.0.0.3"}))
    path = nodes["10.0.0.3"].root / "run" / STEP / shard_name(1, 2)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    message = (
        r"/run/step-00000007/rank-1-of-2.safetensors is on none of the 3 nodes of this Ray; 10\.0\.0\.3 wrote it: "
    )
    with pytest.raises(UserError, match=message):
        supplied(on_path(found), every, [Place("10.0.0.1")], 1)
    with pytest.raises(
        UserError, match=r"rank-0-of-2.safetensors and 1 more is on no node that is here; 10\.0\.0\.2 wrote it"
    ):
        supplied(found, None, [Place("10.0.0.1")], 1)


def test_nodes_that_share_a_folder_among_themselves(nodes: dict[str, Node]) -> None:
    """But not with the driver: the second finds that the first has done it."""
    nodes["10.0.0.3"] = nodes["10.0.0.2"]
    found = saved(nodes, ("10.0.0.2", "10.0.0.3"))
    here = nodes["10.0.0.2"].root / "run" / STEP
    assert {p.name for p in here.iterdir()} == {MANIFEST, shard_name(0, 2), shard_name(1, 2)}
    assert json.loads((here / MANIFEST).read_text())["checkpoint"]["nodes"] == found.nodes


def test_a_copy_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "PIECE", 7)
    content = bytes(range(50))
    (tmp_path / "a").write_bytes(content)
    file = Shelf().listing(str(tmp_path))[0]
    target = tmp_path / "b" / "a"
    copy(target, file, lambda path, offset, size: content[offset : offset + size])
    assert target.read_bytes() == content
    wrong = tmp_path / "b" / "c"
    with pytest.raises(CheckpointError, match=r"came with sha256 .* from another node"):
        copy(wrong, file, lambda path, offset, size: bytes(size))
    assert {p.name for p in wrong.parent.iterdir()} == {"a"}


@pytest.mark.parametrize("name", [None, "experts"])
@pytest.mark.parametrize(("held", "size"), [(1, 4), (4, 1), (4, 2), (2, 8), (8, 4), (1, 1)])
def test_what_a_rank_needs(name: str | None, held: int, size: int) -> None:
    """Each file that has one of its rows, of every parameter, and no other."""
    config = SHAPES[name] if name else TINY
    found = Checkpoint(Path("x"), config, held, 0, "", (), {})
    for rank in range(size):
        rows = [(p.shape[0], fsdp_rows(p.shape[0], rank, size)) for p in trained(config)]
        rows.append((config.value_rows, fsdp_rows(config.value_rows, rank, size)))
        by_row = {shard_name(w, held) for n, mine in rows for w in range(held) if {*mine} & {*fsdp_rows(n, w, held)}}
        assert set(needed(found, rank, size)) == by_row
