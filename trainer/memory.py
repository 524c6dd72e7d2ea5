"""What one trainer rank takes, before it takes it: the tensors that are alive at the fullest moments of a step.

    forward      masters, moments, waiting gradients, gathered weights, saved activations, the head's exponentials
    backward     the same without these, the gradient of the head, and the layer that is at work
    reduction    masters, moments, waiting gradients, the layers' gradients, and the outer gradients twice (before and after
                 FSDP2 packs them for the reduce-scatter, which it does last)
    asking       masters, moments, and of a frozen model the gathered weights, one block's activations and the head's

With adapters (`trainer/adapters.py`) only these have masters, moments and gradients; all weights are there once in the dtype of
activations, merged, and those that have an adapter a second time, frozen.

One rank whose masters are on the device gathers and packs nothing: an op rounds the weight that it reads, and forgets it.

Counted in tensors: a CUDA context (about 0.6 GiB), and what the allocator holds and does not use, come on top.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from kernels.model import ModelConfig, costs, trained
from trainer.config import Offload
from trainer.host import PIECE
from trainer.recompute import Checkpointing

_DEPTH = 3  # pieces that pass through the device at once


@dataclass(frozen=True)
class TrainerMemory:
    """Counts the bytes of one rank; `device` is the GPU, or on a CPU the process's own memory, where `host` is 0."""

    state: int  # masters, moments and the frozen model on the device
    gradients: int  # of this rank's rows, when all are there, and of what waits for its sibling
    activations: int  # saved by one micro-batch, the head's exponentials among them
    peak: int  # of the device in a step
    host: int  # masters, moments and waiting gradients in host memory


def trainer_memory(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    device: str,
    world_size: int,
    replicas: int = 1,
    checkpointing: Checkpointing,
    offload: Offload,
    moments: torch.dtype,
    tokens: int,
    rows: int,
    micro_batches: int,
    frozen: Sequence[ModelConfig] = (),
    past: Sequence[ModelConfig] = (),
) -> TrainerMemory:
    """Predicts the bytes of one trainer process. `world_size`: ranks that share the weights, of each of `replicas`; `tokens`
    and `rows` (response tokens): of the fullest micro-batch on one rank; `micro_batches`: of one step; `frozen`: the models of
    which one at a time is asked beside the policy (`trainer.frozen`); `past`: those that are kept beside it besides."""
    width, table = dtype.itemsize, costs.table_elements(model)
    whole = model.adapter is None
    own, held = costs.parameter_count(model) if whole else costs.trained_elements(model), costs.trained_elements(model)
    outer, layer = costs.outer_elements(model), costs.layer_elements(model)
    learned = costs.layer_trained_elements(model)  # of a layer what has gradients; and outside
    outside = outer if whole else costs.outer_trained_elements(model)
    masters, pair = costs.MASTER * held // world_size, 2 * moments.itemsize * own // world_size
    merged = 0 if whole else width * costs.trainer_elements(model) // world_size
    under = width * costs.adapted_elements(model) // world_size
    sets = micro_batches.bit_length() - 1  # gradients that wait for their sibling
    beside = max((width * costs.trainer_elements(one) // world_size for one in frozen), default=0)
    beside += sum(width * costs.trainer_elements(one) // world_size for one in past)
    on_device = {"none": masters + pair + merged + under, "optimizer": masters + merged, "all": 0}[offload] + beside
    on_host = {"none": 0, "optimizer": pair + under, "all": (sets + 2) * masters + pair + merged + under}[offload]
    waiting = sets * masters if offload != "all" else 0
    reduced = masters if offload != "all" else 0
    fixed = on_device + waiting + costs.position_table_bytes(model)
    asking = max((_asking(one, tokens, rows, width, device, world_size) for one in (*frozen, *past)), default=0)
    saved = width * (costs.saved_elements(model, checkpointing, tokens) + model.hidden_size * tokens)
    head = costs.logprob_bytes(model, rows, width, device == "cuda")
    alone = world_size * replicas == 1 and offload != "all"  # without FSDP2, which brings the next layer beforehand
    fetched = 0 if alone else width * layer
    gathered = _rounded(model, width) if alone else width * (outer + layer) + fetched
    packed = 0 if alone else width * outer + fetched + 8 * learned  # once it is resharded
    works = 4 * learned + width * costs.backward_elements(model, tokens)  # gradients of a layer, and of its inputs
    works += costs.quantizing_bytes(model, width)
    if checkpointing == "layer":
        works += width * costs.layer_saved_elements(model, tokens)
    backward = 4 * table * whole + max(gathered + works, packed)
    last = (4 if alone else 8) * outside
    inner = reduced - 4 * outside // world_size if offload != "all" else 0
    staged = 0 if device == "cpu" else _DEPTH * PIECE
    passing = staged * {"none": 0, "optimizer": 2 * moments.itemsize, "all": 8 + 2 * moments.itemsize}[offload]
    peak = fixed + max(
        gathered + saved + head + 4 * table * whole,
        saved + backward,
        inner + last,
        reduced + passing,
        asking,
    )
    if device == "cpu":
        peak, on_host = peak + on_host, 0
    return TrainerMemory(on_device, reduced + waiting, saved + head, peak, on_host)


def fuller(one: TrainerMemory, other: TrainerMemory) -> TrainerMemory:
    """Returns the most bytes of two trainers of which one follows the other."""
    return TrainerMemory(*(max(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)))


def together(one: TrainerMemory, other: TrainerMemory) -> TrainerMemory:
    """Counts the bytes of two trainers on one rank, a policy and its critic, which step one after the other."""
    return TrainerMemory(
        one.state + other.state,
        max(one.gradients, other.gradients),
        max(one.activations, other.activations),
        max(one.peak + other.state, other.peak + one.state),
        one.host + other.host,
    )


def _rounded(model: ModelConfig, width: int) -> int:
    """Counts the bytes of the largest weight in the dtype of activations, where that is not the masters' own."""
    if width == costs.MASTER:
        return 0
    return width * max(p.elements for p in trained(model))


def _asking(frozen: ModelConfig, tokens: int, rows: int, width: int, device: str, world_size: int) -> int:
    """Counts the bytes of a forward pass of the frozen model, beside its rows: nothing is saved for a backward pass."""
    gathered = costs.outer_elements(frozen) + 2 * costs.layer_elements(frozen) if world_size > 1 else 0
    works = costs.position_table_bytes(frozen) + width * (gathered + costs.backward_elements(frozen, tokens))
    return works + costs.logprob_bytes(frozen, rows, width, device == "cuda")
