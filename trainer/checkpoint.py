"""A checkpoint: a folder with one safetensors file of each rank, and `checkpoint.json`, which says what they must hold.

    step-00000450/
        rank-0-of-2.safetensors    this rank's rows of every parameter: weight.NAME, first.NAME, second.NAME, float32
        rank-1-of-2.safetensors    (master weights and both moments of AdamW; of a run of adapters: of the adapters)
        model/...                  what a model directory holds beside its weights: config.json, tokenizer, ...
        checkpoint.json            shape of the model, step, what the run adds, and size and SHA-256 of every file above

The folder appears by a rename when all of it is on the disk. Rows of a tensor are found in whichever files hold them, so
another number of ranks reads the same bits. Nothing here is pickled.

Where the nodes of a run do not share a folder, each has one of this name with the files of its own ranks and the manifest,
which says who wrote what (`nodes`); before ranks read, what their node lacks is brought there (`rl/cluster/shelves.py`).
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kernels.model import Adapter, ModelConfig, trained
from kernels.model.experts import Experts
from kernels.ops.norm_rope import RopeScaling
from kernels.weights.reshard import fsdp_rows
from kernels.weights.tensor_file import WrittenFile
from trainer.folder import publish

MANIFEST = "checkpoint.json"
PARTS = ("weight", "first", "second")
BESIDE = "model"
BASE = "base"
"""The model directory beside a run's checkpoints that holds the weights under their adapters, where no other does."""
_FORMAT = 1


class CheckpointError(RuntimeError):
    """Says that a checkpoint cannot be written, or is not what was written; one line."""


@dataclass(frozen=True)
class Checkpoint:
    """Describes a complete checkpoint, as its manifest does."""

    folder: Path
    model: ModelConfig
    world_size: int
    optimizer_steps: int  # since the moments were zero
    weights_sha256: str  # `kernels.weights.digest` of the weights as they are served
    files: tuple[WrittenFile, ...]
    run: dict[str, Any]  # what the trainer does not know: JSON
    nodes: dict[str, str] = field(default_factory=dict)  # of files that are not beside the manifest: who wrote them

    @property
    def shards(self) -> list[WrittenFile]:
        """Lists the files of the ranks."""
        names = {shard_name(rank, self.world_size) for rank in range(self.world_size)}
        return [file for file in self.files if file.name in names]


def shard_name(rank: int, size: int) -> str:
    """Names the file of one rank."""
    return f"rank-{rank}-of-{size}.safetensors"


def folder_name(step: int) -> str:
    """Names the folder of a step's checkpoint, so that names sort as steps do."""
    return f"step-{step:08d}"


def folders(root: Path) -> list[Path]:
    """Lists the complete checkpoints in `root`, newest first."""
    return sorted((p for p in root.glob("step-*") if p.is_dir()), key=lambda p: p.name, reverse=True)


def described(
    model: ModelConfig,
    optimizer_steps: int,
    weights_sha256: str,
    shards: Sequence[WrittenFile],
    others: Mapping[str, bytes],
    run: Mapping[str, Any],
    nodes: Mapping[str, str],
) -> str:
    """Returns the manifest of a checkpoint. `nodes`: of `Checkpoint`."""
    files = [WrittenFile(name, len(x), hashlib.sha256(x).hexdigest()) for name, x in others.items()]
    body = {
        "format": _FORMAT,
        "model": asdict(model),
        "world_size": len(shards),
        "optimizer_steps": optimizer_steps,
        "weights_sha256": weights_sha256,
        "files": [asdict(f) for f in (*shards, *files)],
        "run": run,
        "nodes": dict(nodes),
    }
    return json.dumps({"sha256": _digest(body), "checkpoint": body}, indent=1) + "\n"


def finish(folder: Path, final: Path, manifest: str, others: Mapping[str, bytes]) -> None:
    """Writes what goes beside the ranks' files in the temporary `folder`, and renames it to `final`."""
    for name, content in others.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / MANIFEST).write_text(manifest)
    publish(folder, final)


def complete(
    folder: Path,
    final: Path,
    model: ModelConfig,
    optimizer_steps: int,
    weights_sha256: str,
    shards: Sequence[WrittenFile],
    others: Mapping[str, bytes],
    run: Mapping[str, Any],
) -> None:
    """Makes `final` of the temporary `folder`, in which all files of ranks are."""
    manifest = described(model, optimizer_steps, weights_sha256, shards, others, run, {})
    finish(folder, final, manifest, others)


def read(folder: Path) -> Checkpoint:
    """Reads what the manifest says. CheckpointError where it is missing, altered or of another format; `verify` reads the
    rest."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        body = content["checkpoint"]
        if content["sha256"] != _digest(body):
            raise CheckpointError(f"{path} was altered: its sha256 is another")
        if body["format"] != _FORMAT:
            raise CheckpointError(f"{path} has format {body['format']}; this version reads format {_FORMAT}")
        fields = dict(body["model"])
        if fields["rope_scaling"]:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        if experts := fields.get("experts"):
            fields["experts"] = Experts(**experts | {"dense": tuple(experts["dense"])})
        if adapter := fields.get("adapter"):
            fields["adapter"] = Adapter(**adapter | {"ranks": tuple((t, r) for t, r in adapter["ranks"])})
        return Checkpoint(
            folder,
            ModelConfig(**fields),
            body["world_size"],
            body["optimizer_steps"],
            body["weights_sha256"],
            tuple(WrittenFile(**f) for f in body["files"]),
            body["run"],
            body.get("nodes", {}),
        )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # JSON errors, no text: ValueErrors
        raise CheckpointError(f"{path} is no manifest: {type(error).__name__} {error}") from None


def verify(checkpoint: Checkpoint, elsewhere: bool = False) -> None:
    """Reads every file. CheckpointError names the first whose size or SHA-256 is not the manifest's. `elsewhere`: files that
    another node wrote need not be here."""
    folder, nodes = checkpoint.folder, checkpoint.nodes
    files = [f for f in checkpoint.files if not elsewhere or f.name not in nodes or (folder / f.name).exists()]
    with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter free
        for file, found in zip(files, pool.map(lambda f: problem(folder / f.name, f), files), strict=True):
            if found:
                by = f" ({nodes[file.name]} wrote it)" if file.name in nodes else ""
                raise CheckpointError(f"{found}{by}")


def problem(path: Path, file: WrittenFile) -> str:
    """Says what is wrong with a file that must be `file`; "" where it is."""
    try:
        if (size := path.stat().st_size) != file.bytes:
            return f"{path} has {size} bytes, the manifest says {file.bytes}"
        with open(path, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return (
        "" if found == file.sha256 else f"{path} was altered: sha256 {found[:12]}, the manifest says {file.sha256[:12]}"
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_rows(checkpoint: Checkpoint, part: str, name: str, rows: int, start: int, stop: int) -> torch.Tensor:
    """Reads rows start .. stop of the `rows` of a tensor, from all the files that hold some."""
    pieces = list(_pieces(checkpoint, f"{part}.{name}", rows, start, stop))
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def _pieces(checkpoint: Checkpoint, key: str, rows: int, start: int, stop: int) -> Iterator[torch.Tensor]:
    size = checkpoint.world_size
    for rank in range(size):
        held = fsdp_rows(rows, rank, size)
        a, b = max(start, held.start), min(stop, held.stop)
        if a < b:
            with safe_open(os.fspath(checkpoint.folder / shard_name(rank, size)), "pt") as file:
                yield file.get_slice(key)[a - held.start : b - held.start]


def needed(checkpoint: Checkpoint, rank: int, size: int) -> list[str]:
    """Names the files that hold a row of rank `rank` of `size`, of any tensor."""
    held = checkpoint.world_size
    heights = {p.shape[0] for p in trained(checkpoint.model)} | {checkpoint.model.value_rows}
    out = []
    for w in range(held):
        pairs = ((fsdp_rows(n, rank, size), fsdp_rows(n, w, held)) for n in heights)
        if any(max(a.start, b.start) < min(a.stop, b.stop) for a, b in pairs):
            out.append(shard_name(w, held))
    return out
