"""Holds a trainer's settings, apart from what trains: whoever only names them imports no FSDP2, which takes a second or two."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from kernels.gpu.card import chosen_family
from trainer.recompute import Checkpointing

Offload = Literal["none", "optimizer", "all"]
"""What lives in host memory: nothing; the moments; the moments, the master weights, and gradients that wait. No bit changes."""


@dataclass(frozen=True)
class AdamWConfig:
    """Holds AdamW's settings, of which every one decides bits."""

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    moments: torch.dtype = (
        torch.float32
    )  # or bfloat16: rounded to nearest even after every step. Part of the run's identity


@dataclass(frozen=True)
class TrainerConfig:
    """Holds a trainer's settings; what decides bits, and what only memory and speed, is said beside each."""

    leaf_sequences: int  # sequences of one leaf of the gradient's tree: part of the run's identity, like its seed
    micro_leaves: int  # leaves of one micro-batch: changes memory and speed, and no bit
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    dtype: torch.dtype = torch.float32  # of activations
    micro_tokens: int | None = None  # most tokens of a micro-batch, in the place of micro_leaves; likewise
    offload: Offload = "none"  # what lives in host memory; likewise
    checkpointing: Checkpointing = "none"  # what a layer computes again in the backward pass; likewise
    prefix: str = ""  # of its tensors in a checkpoint, where another trainer's stand beside them
    router_aux_loss_coef: float = 0.0  # of a mixture of experts: of the load-balancing loss (`trainer.routing`)
    replicas: int = 1  # times that the ranks hold the model: changes memory and what crosses the network, and no bit
    seed: int = 0  # of the noise that adapters begin with
    adapter: str | None = None  # a folder of `peft` that they begin with instead
    family: str = field(
        default_factory=chosen_family
    )  # of the kernels that a GPU runs; this process's own, if not said
