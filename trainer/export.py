"""`python -m trainer.export CHECKPOINT OUT_DIR`: the weights of a checkpoint as a Hugging Face model directory.

`transformers` loads what it writes: safetensors of at most 5 GB each with their index, config.json with the contract, and all
that the run's model said of tokens (tokenizer, chat template, generation_config.json). One tensor is in memory at a time; the
folder is there whole or not at all.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kernels.host.command import Parser, fail, interruptible
from kernels.model import ConfigError, Parameter, saved
from kernels.tree import WHOLE
from kernels.weights.beside import DTYPES, Beside, name_of
from kernels.weights.digest import Leaves, digest, slice_digests
from kernels.weights.files import save
from trainer.checkpoint import BESIDE, MANIFEST, Checkpoint, CheckpointError, folders, read, read_rows, verify
from trainer.folder import whole


def weights(checkpoint: Checkpoint) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Yields every master weight, float32, one at a time."""
    for parameter in saved(checkpoint.model):
        rows = parameter.shape[0]
        yield parameter, read_rows(checkpoint, "weight", parameter.name, rows, 0, rows)


def export(checkpoint: Checkpoint, out_dir: Path, dtype: torch.dtype, file_bytes: int = 5 * 10**9) -> str:
    """Writes `out_dir`, whole or not at all, and returns the SHA-256 of its weights (`kernels.weights.digest`)."""
    digests: Leaves = {}
    if not (checkpoint.folder / BESIDE).is_dir():
        raise CheckpointError(
            f"{checkpoint.folder} has no folder {BESIDE}: the earlier version that wrote it can export it"
        )
    beside = Beside.read(checkpoint.folder / BESIDE)
    if dtype != torch.float32:  # the masters' last bits are gone, so activations need none
        beside = beside.computed_in(name_of(dtype))

    def rounded() -> Iterator[tuple[Parameter, torch.Tensor]]:
        for parameter, tensor in weights(checkpoint):
            held = tensor.to(dtype)
            digests.update(slice_digests(checkpoint.model, parameter, held, WHOLE))
            yield parameter, held

    with whole(out_dir) as folder:
        save(checkpoint.model, rounded(), folder, dtype, file_bytes, beside)
    return digest(digests)


def main(arguments: Sequence[str]) -> None:
    """Exports as the arguments say; bad input or a damaged checkpoint exits with 2, a failed write with 1, each in one line."""
    parser = Parser(prog="trainer.export", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder, or that of a run: its newest one")
    parser.add_argument("out_dir", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the files; float32 (default): the masters"
    )
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
        sha256 = export(checkpoint, out_dir, DTYPES[args.dtype])
    except (CheckpointError, ConfigError) as error:
        fail(error, 2)
    except OSError as error:
        fail(f"{args.out_dir} could not be written: {error.strerror}", 1)
    print(f"{checkpoint.folder} -> {args.out_dir}")
    numerics = checkpoint.model.numerics
    print(f"weights sha256 {sha256}" + (f" (numerics={numerics})" if numerics != "exact" else ""))


if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
