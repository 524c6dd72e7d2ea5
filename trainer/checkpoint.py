"""A checkpoint: a folder with one safetensors file of each rank, and `checkpoint.json`, which says what they must hold.

    step-00000450/
        rank-0-of-2.safetensors    this rank's rows of every parameter: weight.NAME, first.NAME, second.NAME, float32
        rank-1-of-2.safetensors    (master weights and both moments of AdamW; of a run of adapters: of the adapters)
        model/...                  what a model directory holds beside its weights: config.json, tokenizer, ...
        checkpoint.json            shape of the model, step, what the run adds, and size and SHA-256 of every file above

The folder appears by a rename when all of it is on the disk. Rows of a tensor are found in whichever files hold them, so
another number of ranks reads the same bits. Nothing here is pickled.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kernels.model import Adapter, ModelConfig
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


def shard_name(rank: int, size: int) -> str:
    """Names the file of one rank."""
    return f"rank-{rank}-of-{size}.safetensors"


def folder_name(step: int) -> str:
    """Names the folder of a step's checkpoint, so that names sort as steps do."""
    return f"step-{step:08d}"


def folders(root: Path) -> list[Path]:
    """Lists the complete checkpoints in `root`, newest first."""
    return sorted((p for p in root.glob("step-*") if p.is_dir()), key=lambda p: p.name, reverse=True)


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
    """Writes what goes beside the ranks' files in the temporary `folder`, and renames it to `final`."""
    files = list(shards)
    for name, content in others.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        files.append(WrittenFile(name, len(content), hashlib.sha256(content).hexdigest()))
    body = {
        "format": _FORMAT,
        "model": asdict(model),
        "world_size": len(shards),
        "optimizer_steps": optimizer_steps,
        "weights_sha256": weights_sha256,
        "files": [asdict(f) for f in files],
        "run": run,
    }
    (folder / MANIFEST).write_text(json.dumps({"sha256": _digest(body), "checkpoint": body}, indent=1) + "\n")
    publish(folder, final)


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
        )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # JSON errors, no text: ValueErrors
        raise CheckpointError(f"{path} is no manifest: {type(error).__name__} {error}") from None


def verify(checkpoint: Checkpoint) -> None:
    """Reads every file. CheckpointError names the first whose size or SHA-256 is not the manifest's."""
    with ThreadPoolExecutor(4) as pool:  # hashing leaves the interpreter free
        for problem in pool.map(lambda f: _problem(checkpoint.folder / f.name, f), checkpoint.files):
            if problem:
                raise CheckpointError(problem)


def _problem(path: Path, file: WrittenFile) -> str:
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
