"""What is written is what is read, by any number of ranks; what is damaged is refused; a killed writer leaves nothing half."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kernels.weights.tensor_file import write_tensors
from tests.bits import assert_same_bits, sha256
from tests.collectives.processes import run_ranks
from tests.model.shapes import SHAPES, TINY, random_weights
from tests.trainer.batches import random_batch
from tests.trainer.ranks import RUNS, trainer_config
from trainer import folder
from trainer.checkpoint import Checkpoint, CheckpointError, complete, folder_name, folders, read, shard_name, verify
from trainer.loss import LikelihoodLoss
from trainer.trainer import Trainer, TrainerConfig
from trainer.writer import ShardWriter

LR = 1e-2


def trainer_of(name: str, world: int, source: Checkpoint | None = None) -> Trainer:
    config, weights, *_ = RUNS[name]
    mesh = init_device_mesh("cpu", (world,))
    base = weights(config) if source and config.adapter else None
    return Trainer(config, trainer_config(name, {}), mesh, source or weights(config), base)


def go(trainer: Trainer, name: str, steps: range) -> str:
    for step in steps:
        trainer.step(random_batch(RUNS[name][0], RUNS[name][3], seed=step), LikelihoodLoss(), LR)
    return sha256(w for _, w in trainer.weights())


def written(trainer: Trainer, temporary: Path, rank: int, world: int):
    shard = {k: rows.float() for k, rows in trainer.shard().items()}  # rounded moments too are written as float32
    shapes = {k: tuple(t.shape) for k, t in shard.items()}
    return write_tensors(temporary / shard_name(rank, world), shapes, torch.float32, shard.items())


def before(world: int, root: str) -> None:
    """On every rank: two steps of each run, then its shard."""
    rank = torch.distributed.get_rank()
    for name in RUNS:
        trainer = trainer_of(name, world)
        go(trainer, name, range(2))
        temporary = Path(root) / name
        temporary.mkdir(exist_ok=True)
        file = written(trainer, temporary, rank, world)
        parts: list = [None] * world
        torch.distributed.all_gather_object(parts, file)
        if rank == 0:
            final = Path(root) / f"{name} done"
            complete(temporary, final, RUNS[name][0], trainer.optimizer.steps, "", parts, {"a/b": b"c"}, {"x": 1})
        torch.distributed.barrier()


def after(world: int, root: str) -> dict[str, str]:
    """On every rank: the third step, from a checkpoint of any world."""
    return {name: go(trainer_of(name, world, read(Path(root) / f"{name} done")), name, range(2, 3)) for name in RUNS}


@pytest.mark.parametrize(("first", "then"), [(2, 4), (4, 1)])
def test_another_world_size_goes_on_with_the_same_bits(first: int, then: int, mesh: DeviceMesh, tmp_path: Path) -> None:
    """Tied and untied, float32 and bfloat16, rows that no world divides: weights, both moments and the step count."""
    run_ranks(first, before, first, str(tmp_path))
    ends = after(1, str(tmp_path)) if then == 1 else run_ranks(then, after, then, str(tmp_path))[0]
    for name in RUNS:
        checkpoint = read(tmp_path / f"{name} done")
        verify(checkpoint)
        assert (checkpoint.model, checkpoint.world_size, checkpoint.run) == (RUNS[name][0], first, {"x": 1})
        assert ends[name] == go(trainer_of(name, 1), name, range(3)), name


@pytest.fixture
def checkpoint(mesh: DeviceMesh, tmp_path: Path) -> Path:
    trainer = Trainer(TINY, TrainerConfig(2, 1), mesh, random_weights(TINY))
    temporary = folder.temporary(tmp_path / "root" / folder_name(7))
    file = written(trainer, temporary, 0, 1)
    complete(temporary, tmp_path / "root" / folder_name(7), TINY, 0, "", [file], {"tokenizer/t.json": b"{}"}, {})
    return tmp_path / "root" / folder_name(7)


def test_nothing_is_pickled(checkpoint: Path) -> None:
    kinds = {p.suffix for p in checkpoint.rglob("*") if p.is_file()}
    assert kinds == {".safetensors", ".json"}
    assert folders(checkpoint.parent) == [checkpoint]
    for path in checkpoint.rglob("*"):
        assert path.is_dir() or not path.read_bytes().startswith((b"\x80", b"PK"))


@pytest.mark.parametrize("file", [shard_name(0, 1), "tokenizer/t.json"])
def test_what_is_altered_is_refused_by_its_digest(checkpoint: Path, file: str) -> None:
    path = checkpoint / file
    content = path.read_bytes()
    verify(read(checkpoint))
    for place in (0, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(
            CheckpointError, match=f"{file} was altered: sha256 [0-9a-f]{{12}}, the manifest says"
        ) as error:
            verify(read(checkpoint))
        assert "\n" not in str(error.value)
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{file} has {len(content) - 1} bytes, the manifest says {len(content)}"):
        verify(read(checkpoint))
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{file} cannot be read: No such file"):
        verify(read(checkpoint))


def test_an_altered_manifest_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "checkpoint.json"
    content = json.loads(path.read_text())
    cases = {
        "": "is no manifest",
        "{}": "is no manifest",
        path.read_text()[:-9]: "is no manifest",
        json.dumps(content | {"checkpoint": content["checkpoint"] | {"optimizer_steps": 1}}): "was altered",
    }
    for text, part in cases.items():
        path.write_text(text)
        with pytest.raises(CheckpointError, match=f"checkpoint.json {part}") as error:
            read(checkpoint)
        assert "\n" not in str(error.value)
    path.write_bytes(b"\xff\x00")
    with pytest.raises(CheckpointError, match="is no manifest"):
        read(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read(checkpoint)


def test_another_format_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "checkpoint.json"
    body = json.loads(path.read_text())["checkpoint"] | {"format": 2}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"sha256": digest, "checkpoint": body}))
    with pytest.raises(CheckpointError, match=r"checkpoint.json has format 2; this version reads format 1"):
        read(checkpoint)


@pytest.mark.parametrize("name", ["tiny", "llama 3.1", "experts, dense layers"])
def test_the_shape_is_the_one_that_was_written(name: str, tmp_path: Path) -> None:
    """Of its rope scaling too."""
    temporary = folder.temporary(tmp_path / "done")
    complete(temporary, tmp_path / "done", SHAPES[name], 0, "", [], {}, {})
    assert read(tmp_path / "done").model == SHAPES[name]


def test_the_writer_waits_and_tells(tmp_path: Path) -> None:
    writer = ShardWriter()
    assert writer.result(wait=True) is None
    big = {"x": torch.arange(2_000_000, dtype=torch.float32)}
    writer.start(tmp_path / "a", big)
    writer.start(tmp_path / "b", big)  # waits for the first
    assert (tmp_path / "a").stat().st_size > 8_000_000
    done = writer.result(wait=True)
    assert done is not None and done.name == "b" and done == writer.result(wait=False)
    writer.start(tmp_path / "far" / "c", big)  # on a node that does not see the driver's folder
    assert writer.result(wait=True) is not None and (tmp_path / "far" / "c").stat().st_size > 8_000_000
    writer.start(tmp_path / "a" / "c", big)  # below a file
    with pytest.raises(CheckpointError, match=r"could not be written: (File exists|Not a directory)"):
        writer.result(wait=True)
    writer.start(tmp_path / "a" / "c", big)
    with pytest.raises(CheckpointError, match="could not be written"):
        writer.start(tmp_path / "d", big)
    writer.start(tmp_path / "e", big)
    assert writer.result(wait=True) is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part, said", [("weight", "weight"), ("first", "first moment"), ("second", "second moment")])
def test_no_file_holds_what_is_not_finite(part: str, said: str, value: float, tmp_path: Path) -> None:
    writer, spoiled = ShardWriter(), torch.zeros(70, 30)
    spoiled[69, 29] = value
    tensors = {"weight.embed": torch.full((4,), 3e38), "weight.empty": torch.empty(0, 3), f"{part}.norm": spoiled}
    writer.start(tmp_path / "shard", tensors)
    with pytest.raises(CheckpointError, match=rf"could not be written: the {said} of norm is not finite"):
        writer.result(wait=True)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_the_next_is_refused(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (2,), "b": (1, 3)}
    good = {"a": torch.ones(2), "b": torch.ones(1, 3)}
    for tensors in (
        {"a": good["a"]},
        {"b": good["b"], "a": good["a"]},
        good | {"b": torch.ones(3)},
        good | {"c": good["a"]},
    ):
        with pytest.raises(ValueError, match=r"is not the next tensor|was not given"):
            write_tensors(tmp_path / "x", shapes, torch.float32, tensors.items())


def save_forever(root: str) -> None:
    """Checkpoints as fast as they go: every tensor of number n is n."""
    n = 0
    while True:
        n += 1
        temporary = folder.temporary(Path(root) / folder_name(n))
        tensors = {f"weight.{i}": torch.full((20_000,), float(n)) for i in range(20)}
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        file = write_tensors(temporary / shard_name(0, 1), shapes, torch.float32, tensors.items())
        complete(temporary, Path(root) / folder_name(n), TINY, n, "", [file], {}, {})
        for old in folders(Path(root))[2:]:
            folder.remove(old)


def test_a_killed_writer_leaves_whole_checkpoints(tmp_path: Path) -> None:
    """At fifteen moments of writing, renaming and removing."""
    context = multiprocessing.get_context("forkserver")
    draw, counts = random.Random(0), []
    for _ in range(15):
        process = context.Process(target=save_forever, args=(str(tmp_path),), daemon=True)
        process.start()
        while not folders(tmp_path):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        found = folders(tmp_path)
        assert 1 <= len(found) <= 4
        for path in found:
            checkpoint = read(path)
            verify(checkpoint)
            assert folder_name(checkpoint.optimizer_steps) == path.name
        counts.append(len(list(tmp_path.glob(".*.tmp"))))
        folder.clear(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(found)
        for path in found:
            shutil.rmtree(path)
    assert any(counts), "no kill met a folder that was half made"


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what stood there is renamed before it is removed file by file."""
    events: list[tuple[str, Path]] = []
    for module, name in ((folder, "_sync"), (os, "rename"), (shutil, "rmtree")):
        real = getattr(module, name)

        def told(path: Path, *args: Any, real: Any = real, name: str = name, **kwargs: Any) -> None:
            events.append((name, Path(path)))
            real(path, *args, **kwargs)

        monkeypatch.setattr(module, name, told)
    final = tmp_path / "model"
    for _ in range(2):
        events.clear()
        with folder.whole(final) as temporary:
            (temporary / "part").mkdir()
            (temporary / "part" / "x").write_text("x")
            made = {temporary, temporary / "part", temporary / "part" / "x"}
        at = events.index(("rename", temporary))
        assert {path for name, path in events[:at] if name == "_sync"} == made
        assert ("_sync", tmp_path) in events[at:]
        assert ("rmtree", final) not in events


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for text in ("old", "new"):
        with folder.whole(final) as temporary:
            (temporary / text).write_text(text)
            assert not (final / text).exists()
        assert [p.name for p in final.iterdir()] == [text]
    with pytest.raises(KeyError), folder.whole(final) as temporary:
        (temporary / "bad").write_text("bad")
        raise KeyError
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "new"]


def test_empty_shards(mesh: DeviceMesh, tmp_path: Path) -> None:
    """Four ranks, three rows: the last file holds a tensor of no rows, which is read as any other."""
    rows = torch.arange(6.0).view(3, 2)
    for rank in range(4):
        write_tensors(tmp_path / shard_name(rank, 4), {"first.x": rows[rank : rank + 1].shape}, torch.float32,
                      [("first.x", rows[rank : rank + 1])])  # fmt: skip
    from trainer.checkpoint import read_rows

    checkpoint = Checkpoint(tmp_path, TINY, 4, 0, "", (), {})
    for start, stop in [(0, 3), (1, 2), (2, 3), (0, 1)]:
        assert_same_bits(read_rows(checkpoint, "first", "x", 3, start, stop), rows[start:stop])
