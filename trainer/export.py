"""`python -m trainer.export CHECKPOINT OUT_DIR`: the weights of a checkpoint as a Hugging Face model directory.

`transformers` loads what it writes: safetensors of at most 5 GB each with their index, config.json with the contract, and all
that the run's model said of tokens (tokenizer, chat template, generation_config.json). One tensor is in memory at a time; the
folder is there whole or not at all. Of a run of adapters it writes a folder that `peft` loads, or with `--merge` a whole model.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from kernels.host.command import Parser, fail, interruptible
from kernels.model import ConfigError, ModelConfig, Parameter, saved, trained
from kernels.tree import WHOLE
from kernels.weights.adapters import load_merged, modules_of, write
from kernels.weights.beside import DTYPES, Beside, name_of
from kernels.weights.digest import Leaves, digest, slice_digests
from kernels.weights.files import save
from trainer.checkpoint import BASE, BESIDE, MANIFEST, Checkpoint, CheckpointError, folders, read, read_rows, verify
from trainer.folder import whole


def weights(checkpoint: Checkpoint) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Yields every master weight, float32, one at a time."""
    for parameter in saved(checkpoint.model):
        yield parameter, _whole(checkpoint, parameter)


def _whole(checkpoint: Checkpoint, parameter: Parameter) -> torch.Tensor:
    rows = parameter.shape[0]
    return read_rows(checkpoint, "weight", parameter.name, rows, 0, rows)


def base_of(checkpoint: Checkpoint) -> Path:
    """Returns the model directory under the adapters of a checkpoint: the one that the run was given, or its own."""
    return Path(checkpoint.run.get("base") or checkpoint.folder.parent.parent / BASE)


def export(checkpoint: Checkpoint, out_dir: Path, dtype: torch.dtype, file_bytes: int = 5 * 10**9) -> str:
    """Writes `out_dir`, whole or not at all, and returns the SHA-256 of its weights (`kernels.weights.digest`)."""
    beside = _beside(checkpoint)
    if dtype != torch.float32:  # the masters' last bits are gone, so activations need none
        beside = beside.computed_in(name_of(dtype))
    digests: Leaves = {}
    with whole(out_dir) as folder:
        rounded = _observed(checkpoint.model, weights(checkpoint), dtype, digests)
        save(checkpoint.model, rounded, folder, dtype, file_bytes, beside)
    return digest(digests)


def export_merged(checkpoint: Checkpoint, out_dir: Path, base: Path, file_bytes: int = 5 * 10**9) -> str:
    """As `export`, of a checkpoint of adapters on the model directory `base`: merged, in the dtype that the run computed in.
    CheckpointError where the weights are not those that the run served."""
    beside = _beside(checkpoint)
    dtype, digests = DTYPES[beside.contract.dtype], Leaves()
    modules = modules_of(checkpoint.model, {p.name: _whole(checkpoint, p) for p in trained(checkpoint.model)})
    with whole(out_dir) as folder:
        merged = load_merged(checkpoint.model, base, modules, dtype)
        save(checkpoint.model, _observed(checkpoint.model, merged, dtype, digests), folder, dtype, file_bytes, beside)
        if (found := digest(digests)) != checkpoint.weights_sha256:
            raise CheckpointError(
                f"{base} has other weights than those under the adapters of {checkpoint.folder}: merged, their sha256 is "
                f"{found[:12]}, the checkpoint says {checkpoint.weights_sha256[:12]}"
            )
    return found


def export_adapter(checkpoint: Checkpoint, out_dir: Path, base: Path) -> None:
    """Writes the adapters of a checkpoint, float32, as a folder that `peft` loads, whole or not at all."""
    with whole(out_dir) as folder:
        tensors = {p.name: _whole(checkpoint, p) for p in trained(checkpoint.model)}
        write(folder, checkpoint.model, tensors, str(base.absolute()))


def _beside(checkpoint: Checkpoint) -> Beside:
    if not (checkpoint.folder / BESIDE).is_dir():
        raise CheckpointError(
            f"{checkpoint.folder} has no folder {BESIDE}: the earlier version that wrote it can export it"
        )
    return Beside.read(checkpoint.folder / BESIDE)


def _observed(
    model: ModelConfig, tensors: Iterable[tuple[Parameter, torch.Tensor]], dtype: torch.dtype, digests: Leaves
) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Yields them rounded, and notes their digests."""
    for parameter, tensor in tensors:
        held = tensor.to(dtype)
        digests.update(slice_digests(model, parameter, held, WHOLE))
        yield parameter, held


def _export(checkpoint: Checkpoint, out_dir: Path, args: argparse.Namespace) -> str:
    """Exports what the arguments ask for; returns the digest of the weights, "" where none are written."""
    if checkpoint.model.adapter is None:
        if args.merge or args.base:
            raise CheckpointError(
                f"{checkpoint.folder} holds whole weights and no adapters: leave out --merge and --base"
            )
        return export(checkpoint, out_dir, DTYPES[args.dtype or "float32"])
    if args.dtype:
        raise CheckpointError(
            f"{checkpoint.folder} holds adapters: they are float32, and merged weights have the dtype of the run; leave out "
            f"--dtype"
        )
    base = args.base or base_of(checkpoint)
    if args.merge:
        return export_merged(checkpoint, out_dir, base)
    export_adapter(checkpoint, out_dir, base)
    return ""


def main(arguments: Sequence[str]) -> None:
    """Exports as the arguments say; bad input or a damaged checkpoint exits with 2, a failed write with 1, each in one line."""
    parser = Parser(prog="trainer.export", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or that of a run: its newest one")
    parser.add_argument("out_dir", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--dtype", choices=DTYPES, help="of the files; float32 (default): the masters")
    parser.add_argument("--merge", action="store_true", help="of a run of adapters: a whole model, with these merged")
    parser.add_argument("--base", type=Path, help="the model directory under the adapters, where it was moved")
    args = parser.parse_args(arguments)
    try:
        single = (args.checkpoint / MANIFEST).exists()
        found = [args.checkpoint] if single else folders(args.checkpoint / "checkpoints") or folders(args.checkpoint)
        if not found:
            fail(f"{args.checkpoint} is neither a checkpoint nor a folder that holds any", 2)
        if args.out_dir.exists() and (not args.out_dir.is_dir() or any(args.out_dir.iterdir())):
            fail(f"{args.out_dir} exists already: choose another or remove it", 2)
        checkpoint = read(found[0])
        verify(checkpoint)
        out_dir = args.out_dir.resolve()  # where a link points to, so that the link stays
        sha256 = _export(checkpoint, out_dir, args)
    except (CheckpointError, ConfigError) as error:
        fail(error, 2)
    except OSError as error:
        fail(f"{args.out_dir} could not be written: {error.strerror}", 1)
    print(f"{checkpoint.folder} -> {args.out_dir}")
    if not sha256:
        return
    numerics = checkpoint.model.numerics
    print(f"weights sha256 {sha256}" + (f" (numerics={numerics})" if numerics != "exact" else ""))


if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
