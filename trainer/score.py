"""`python -m trainer.score MODEL BATCH.npz OUT.npy`: the log-probs that the trainer computes for given texts.

The trainer as it trains, one rank over float32 masters, with the texts side by side in one packed batch; forward
only. BATCH holds `token_ids` of all texts and, one a text, `lengths`, `temperatures`, and the `top_k`, `top_p` and `min_p` by
which its tokens from place `prompts` on were cut; OUT is float32, one log-prob for each token but the first of each text.
`rollout.verify` compares a sampler with it: files are all that the two share.
"""

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kernels.cpu import BuildError
from kernels.device import UnsupportedError
from kernels.host.command import Parser, count, fail, interruptible, output, threads, warn
from kernels.model import ConfigError
from kernels.model.formats import FORMATS, PLAIN
from kernels.tree import TreeError
from kernels.weights.adapters import load_merged
from kernels.weights.adapters import read as read_adapter
from kernels.weights.beside import DTYPES
from kernels.weights.folder import ModelFolder
from trainer.batch import COLUMNS, Batch, BatchError
from trainer.model import batch_logprobs
from trainer.rows import Weights, hold_as_stored
from trainer.trainer import Trainer, TrainerConfig


def batch_of(texts: Mapping[str, np.ndarray]) -> Batch:
    """Makes a batch of whole texts: every token but the first of each is a loss row."""
    token_ids, lengths = texts["token_ids"].astype(np.int64), texts["lengths"].astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    rows = np.delete(np.arange(len(token_ids)), starts)
    text = np.repeat(np.arange(len(lengths)), lengths - 1)
    sampled = rows - starts[text] >= texts["prompts"][text]

    def column(name: str, field: str, where: np.ndarray | bool = True) -> np.ndarray:
        dtype, neutral = COLUMNS[field]
        return np.where(where, texts[name][text], neutral).astype(dtype)

    filters = {name: column(name, name, sampled) for name in ("top_k", "top_p", "min_p")}
    return Batch.of(token_ids, lengths, rows, temperatures=column("temperatures", "temperatures"), **filters)


def score(trainer: Trainer, texts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Computes the log-prob of every token but the first of each text: float32 [tokens - texts]."""
    batch = batch_of(texts)
    with torch.no_grad():
        return batch_logprobs(trainer.model, batch, batch.sequences, trainer.device).cpu().numpy()


_OF_TEXTS = ("lengths", "prompts", "temperatures", "top_k", "top_p", "min_p")


def read(path: Path, vocabulary: int) -> dict[str, np.ndarray]:
    """Reads BATCH, or raises BatchError. No pickle is loaded."""
    try:
        with np.load(path) as file:
            batch = {name: file[name] for name in ("token_ids", *_OF_TEXTS)}
    except KeyError as error:
        raise BatchError(f"{path}: {error.args[0]}") from None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise BatchError(f"{path} is no .npz of arrays: {error}") from None
    ids, lengths = batch["token_ids"], batch["lengths"]
    shapes = {name: batch[name].shape for name in _OF_TEXTS}
    if len(set(shapes.values())) > 1 or lengths.ndim != 1 or not len(lengths):
        raise BatchError(f"{path}: {shapes}; each must be [texts]")
    if any(array.dtype.kind != "i" for array in (ids, lengths, batch["prompts"])):
        raise BatchError(f"{path}: token_ids, lengths and prompts must be integers")
    if lengths.min() < 1 or ids.shape != (lengths.sum(),):
        raise BatchError(
            f"{path}: lengths of {lengths.min()} and more, {lengths.sum()} in all, for token_ids {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise BatchError(f"{path}: token_ids {ids.min()} .. {ids.max()} for a vocabulary of {vocabulary}")
    return batch


def main() -> None:
    """Scores the texts of the batch; bad input exits with 2."""
    parser = Parser(prog="python -m trainer.score", description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face model directory")
    parser.add_argument("batch", type=Path)
    parser.add_argument("out", type=output)
    parser.add_argument(
        "--adapter", type=Path, help="a folder of LoRA adapters of the model (peft), merged into its weights"
    )
    parser.add_argument("--leaves", type=count, help="of every sum; default: as the model's contract says, or 8")
    parser.add_argument("--dtype", choices=DTYPES, help="of activations; default: as the contract says, or float32")
    formats = (PLAIN, *FORMATS)
    parser.add_argument("--format", choices=formats, help="of projections; default: as the contract says, or plain")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=threads, default=2)
    parser.add_family()
    args = parser.parse_args()
    parser.require(args.device, args.family)
    try:
        run(args)
    except (ConfigError, BatchError, TreeError, BuildError, UnsupportedError, OSError) as error:
        fail(error, 2)


def run(args: argparse.Namespace) -> None:
    """Reads the model and BATCH, and writes OUT."""
    torch.set_num_threads(args.threads)
    folder = ModelFolder(args.model)
    contract = folder.asked(args.leaves, args.dtype, otherwise="float32", format=args.format)
    for line in folder.remarks(contract, "--leaves", "--dtype", "--format"):
        warn(line)
    config = folder.model(contract.leaves, contract.format)
    config.check_dtype(DTYPES[contract.dtype])
    folder.tensors(config)
    modules = read_adapter(args.adapter, config) if args.adapter else {}
    batch = read(args.batch, config.vocab_size)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        how = TrainerConfig(1, 1, dtype=DTYPES[contract.dtype])
        weights: Weights = load_merged(config, args.model, modules, how.dtype) if args.adapter else args.model
        trainer = Trainer(config, how, init_device_mesh(args.device, (1,)), weights)
        if folder.published and not args.adapter:
            hold_as_stored(trainer.model, args.model)
        with open(args.out, "wb") as out:
            np.save(out, score(trainer, batch))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    with interruptible():
        main()
