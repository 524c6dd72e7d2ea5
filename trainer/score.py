"""`python -m trainer.score MODEL BATCH.npz OUT.npy`: the log-probs that the trainer computes for given texts.

The trainer as it trains, one rank of FSDP2 over float32 masters, with the texts side by side in one packed batch; forward
only. BATCH holds `token_ids` of all texts and, one a text, `lengths`, `temperatures`, and the `top_k`, `top_p` and `min_p` by
which its tokens from place `prompts` on were cut; OUT is float32, one log-prob for each token but the first of each text.
`rollout.verify` compares a sampler with it: files are all that the two share.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kernels.model import Layout, ModelConfig
from kernels.ops import Truncation
from trainer.trainer import Trainer, TrainerConfig


def score(trainer: Trainer, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 [tokens - texts]."""
    token_ids, lengths = batch["token_ids"], batch["lengths"]
    starts = np.cumsum(lengths) - lengths
    rows = np.delete(np.arange(len(token_ids)), starts)
    text = np.repeat(np.arange(len(lengths)), lengths - 1)
    sampled = rows - starts[text] >= batch["prompts"][text]
    cut = (batch["top_k"] > 0) | (batch["top_p"] < 1) | (batch["min_p"] > 0)
    cut_rows = np.flatnonzero(sampled & cut[text])
    truncation = Truncation(
        torch.from_numpy(cut_rows),
        torch.from_numpy(batch["top_k"][text[cut_rows]].astype(np.int64)),
        torch.from_numpy(batch["top_p"][text[cut_rows]].astype(np.float32)),
        torch.from_numpy(batch["min_p"][text[cut_rows]].astype(np.float32)),
    )
    device = trainer.device
    with torch.no_grad():
        logprobs = trainer.model(
            torch.from_numpy(token_ids.astype(np.int64)).to(device),
            Layout.packed(lengths.tolist(), [len(lengths)], device),
            torch.from_numpy(rows).to(device),
            torch.tensor([0, len(rows)], device=device),
            torch.from_numpy(batch["temperatures"][text].astype(np.float32)).to(device),
            truncation.to(device),
        )
    return logprobs.cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face model directory")
    parser.add_argument("batch", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--leaves", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of activations")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = ModelConfig.from_directory(args.model, args.leaves)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        how = TrainerConfig(1, 1, dtype=getattr(torch, args.dtype))
        trainer = Trainer(config, how, init_device_mesh(args.device, (1,)), args.model)
        with np.load(args.batch) as batch:
            np.save(args.out, score(trainer, batch))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
