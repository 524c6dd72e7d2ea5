"""The weights by name: shapes, shards, Hugging Face names, files, and the digest that both sides must agree on."""

import hashlib
import json
import math
import os
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from kernels.model.beside import Beside, Contract
from kernels.model.config import ModelConfig
from kernels.model.decoder import LayerWeights, OuterWeights
from kernels.model.fields import ConfigError
from kernels.model.stored import INDEX, SINGLE, stored_tensors
from kernels.model.tensor_file import write_tensors
from kernels.ops import normal
from kernels.tree import Shard


@dataclass(frozen=True)
class Parameter:
    """One tensor as the model holds it: one or several Hugging Face tensors stacked by rows."""

    name: str
    sections: tuple[int, ...]  # rows of each Hugging Face tensor
    columns: int  # 0 for a vector
    hf_names: tuple[str, ...]
    axis: int | None  # tensor-parallel axis; None: every rank holds it whole
    padding: int = 0  # the last of these rows, zeros that no file has

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(self.sections), self.columns) if self.columns else (sum(self.sections),)

    @property
    def stored(self) -> tuple[int, ...]:
        """Rows of each Hugging Face tensor in a file."""
        return (*self.sections[:-1], self.sections[-1] - self.padding)

    def pad(self, stored: torch.Tensor) -> torch.Tensor:
        """The rows that are held, of those in files."""
        return torch.cat([stored, stored.new_zeros(self.padding, *stored.shape[1:])]) if self.padding else stored

    def shard(self, whole: torch.Tensor, shard: Shard) -> torch.Tensor:
        """This rank's part, contiguous: each section cut on its own, so that a rank holds whole heads."""
        if self.axis is None:
            return whole.contiguous()
        if self.axis == 1:
            return whole[:, shard.range(self.columns, self.name)].contiguous()
        return torch.cat([part[shard.range(len(part), self.name)] for part in whole.split(self.sections)])

    def part(self, shard: Shard) -> "Parameter":
        """The shape of what `shard` holds."""
        if self.axis == 0:
            return replace(self, sections=tuple(shard.part(s, self.name) for s in self.sections), padding=0)
        return replace(self, columns=shard.part(self.columns, self.name)) if self.axis == 1 else self


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every parameter, in a fixed order. A tied head is no parameter."""
    H, I, D = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.heads * D, config.kv_heads * D
    rows, padding = (config.vocab_rows,), config.vocab_rows - config.vocab_size
    out = [Parameter("embed", rows, H, ("model.embed_tokens.weight",), 0, padding)]
    for i in range(config.layers):
        at, hf = f"layers.{i}.", f"model.layers.{i}."
        qkv = [f"{hf}self_attn.{x}_proj" for x in "qkv"]
        gate_up = tuple(f"{hf}mlp.{x}_proj.weight" for x in ("gate", "up"))
        out += [
            Parameter(at + "attn_norm", (H,), 0, (hf + "input_layernorm.weight",), None),
            Parameter(at + "qkv", (q, kv, kv), H, tuple(f"{name}.weight" for name in qkv), 0),
        ]
        if config.family.qkv_bias:
            out.append(Parameter(at + "qkv_bias", (q, kv, kv), 0, tuple(f"{name}.bias" for name in qkv), 0))
        if config.family.qk_norm:
            out += [Parameter(at + f"{x}_norm", (D,), 0, (f"{hf}self_attn.{x}_norm.weight",), None) for x in "qk"]
        out += [
            Parameter(at + "o", (H,), q, (hf + "self_attn.o_proj.weight",), 1),
            Parameter(at + "mlp_norm", (H,), 0, (hf + "post_attention_layernorm.weight",), None),
            Parameter(at + "gate_up", (I, I), H, gate_up, 0),
            Parameter(at + "down", (H,), I, (hf + "mlp.down_proj.weight",), 1),
        ]
    out.append(Parameter("norm", (H,), 0, ("model.norm.weight",), None))
    if not config.tied:
        out.append(Parameter("head", rows, H, ("lm_head.weight",), 0, padding))
    return out


def layer_weights(weights: Mapping[str, torch.Tensor], index: int) -> LayerWeights:
    at = f"layers.{index}."
    return LayerWeights(**{name: weights.get(at + name) for name in LayerWeights.__dataclass_fields__})


def outer_weights(weights: Mapping[str, torch.Tensor]) -> OuterWeights:
    return OuterWeights(weights["embed"], weights["norm"], weights.get("head", weights["embed"]))


def initial(config: ModelConfig, seed: int, soonest: bool = False) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Random weights, float32: norms 1, biases 0, matrices normal with standard deviation init_std (o and down divided by
    sqrt(2 layers), Radford et al. 2019, section 2.3). Each tensor's noise is keyed by (seed, name), so it depends on
    neither order nor sharding (`kernels.ops.normal`). Drawn by up to 8 threads, as many tensors ahead; in the order of
    `parameters`, or, `soonest`, in one that lets no thread wait."""

    def draw(parameter: Parameter) -> torch.Tensor:
        if not parameter.columns:
            return (torch.zeros if parameter.name.endswith("bias") else torch.ones)(parameter.shape)
        deviation = config.init_std / math.sqrt(2 * config.layers) if parameter.axis == 1 else config.init_std
        shape = (sum(parameter.stored), parameter.columns)
        return parameter.pad(normal(shape, seed, zlib.crc32(parameter.name.encode()), deviation))

    workers, todo = min(8, os.cpu_count() or 1), list(parameters(config))
    if soonest:
        todo.sort(key=lambda p: prod(p.shape))
    late = [todo.pop(), todo.pop()] if soonest else []  # the largest, a thread each: begun first, given last
    with ThreadPoolExecutor(workers) as pool:
        largest = [(parameter, pool.submit(draw, parameter)) for parameter in late]
        drawn: deque[tuple[Parameter, Future[torch.Tensor]]] = deque()
        for parameter in todo:
            drawn.append((parameter, pool.submit(draw, parameter)))
            if len(drawn) > workers:
                first, tensor = drawn.popleft()
                yield first, tensor.result()
        for first, tensor in (*drawn, *largest):
            yield first, tensor.result()


_FLOATS = ("F64", "F32", "F16", "BF16")


def find(config: ModelConfig, directory: str | Path) -> dict[str, Path]:
    """The safetensors file of every tensor that `config` asks for. ConfigError: a file that cannot be read, a tensor that is
    missing, has another shape or is quantized, or one inside a layer that no parameter reads. Reads headers only."""
    stored = stored_tensors(Path(directory))
    for parameter in parameters(config):
        columns = (parameter.columns,) if parameter.columns else ()
        for name, rows in zip(parameter.hf_names, parameter.stored, strict=True):
            if name not in stored:
                raise ConfigError(f"{directory} has no tensor {name}, which the config asks for")
            tensor = stored[name]
            if tensor.shape != (rows, *columns):
                raise ConfigError(f"{tensor.path}: {name} is {tensor.shape}, the config says {(rows, *columns)}")
            if tensor.dtype not in _FLOATS:
                raise ConfigError(f"{tensor.path}: {name} is {tensor.dtype}; taken are {', '.join(_FLOATS)}")
    where = {name: tensor.path for name, tensor in stored.items()}
    _check_unread(config, where)
    return where


def _check_unread(config: ModelConfig, where: Mapping[str, Path]) -> None:
    """A bias or a norm inside a layer of the config would change its numbers; other heads and further layers would not."""
    read = {name for parameter in parameters(config) for name in parameter.hf_names}
    layer = re.compile(r"model\.layers\.(\d{1,9})\.(?!.*\.inv_freq$)")
    for name in sorted(where.keys() - read):
        if (match := layer.match(name)) and int(match[1]) < config.layers:
            raise ConfigError(f"{where[name]} holds {name}, which a {config.model_type} of this config has no use for")


def load(config: ModelConfig, directory: str | Path) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Every parameter from the safetensors files of a Hugging Face model directory, one at a time."""
    where = find(config, directory)

    def read(name: str) -> torch.Tensor:
        with safe_open(where[name], "pt") as file:
            return file.get_tensor(name)

    for parameter in parameters(config):
        yield parameter, parameter.pad(torch.cat([read(name) for name in parameter.hf_names]))


def read_rows(where: Mapping[str, Path], parameter: Parameter, start: int, stop: int) -> torch.Tensor:
    """Rows start .. stop of `parameter`, from the files that `find` found, and no others: nothing is whole in memory."""
    pieces, first = [], 0
    for name, rows in zip(parameter.hf_names, parameter.stored, strict=True):
        a, b = max(start, first) - first, min(stop, first + rows) - first
        if a < b:
            with safe_open(where[name], "pt") as file:
                pieces.append(file.get_slice(name)[a:b])
        first += rows
    if stop > first:
        pieces.append(torch.zeros(stop - max(start, first), *parameter.shape[1:]))
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def to_hf(parameter: Parameter, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    stored = whole[: sum(parameter.stored)].split(parameter.stored)
    return {n: t.contiguous() for n, t in zip(parameter.hf_names, stored, strict=True)}


def save(
    config: ModelConfig,
    whole: Iterable[tuple[Parameter, torch.Tensor]],
    directory: str | Path,
    dtype: torch.dtype | None = None,
    file_bytes: int = 5 * 10**9,
    beside: Beside | None = None,
) -> None:
    """A Hugging Face model directory that `transformers` loads: model.safetensors or, where that would exceed `file_bytes`,
    numbered files and their index, and what stands beside them: config.json with the contract, and what is said of tokens.

    `whole`: every parameter, in the order of `parameters`, one in memory at a time; rounded to `dtype` (None: that of the
    first). `beside` (None: nothing is known of tokens, and the contract is that of `dtype`).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arriving = iter(whole)
    first = next(arriving)
    dtype = dtype or first[1].dtype
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for parameter in parameters(config):
        for name, rows in zip(parameter.hf_names, parameter.stored, strict=True):
            shape = (rows, *parameter.shape[1:])
            size += prod(shape) * dtype.itemsize
            if size > file_bytes and files[-1]:
                files.append({})
                size = prod(shape) * dtype.itemsize
            files[-1][name] = shape
    tensors = (item for p, tensor in chain([first], arriving) for item in to_hf(p, tensor.to(dtype)).items())
    count, where = len(files), {}
    for i, shapes in enumerate(files, 1):
        name = f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
        write_tensors(directory / name, shapes, dtype, islice(tensors, len(shapes)))
        where |= dict.fromkeys(shapes, name)
    if count > 1:
        total = sum(prod(shape) for shapes in files for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (beside or Beside(Contract.of(config, dtype))).write(config, dtype, directory)


Leaves = dict[tuple[str, int], str]


def slice_digests(config: ModelConfig, parameter: Parameter, held: torch.Tensor, shard: Shard) -> Leaves:
    """SHA-256 of each 1 / leaves slice of `parameter` that this shard holds, keyed by (name, slice number)."""
    if parameter.axis is None:
        return {(parameter.name, 0): _sha256(held)}
    slices = config.leaves // shard.size
    part = parameter.part(shard)
    held = held.detach().cpu()
    with ThreadPoolExecutor(min(8, slices)) as pool:  # hashing leaves the interpreter free
        hashes = list(pool.map(lambda i: _sha256(part.shard(held, Shard(i, slices))), range(slices)))
    return {(parameter.name, shard.rank * slices + i): value for i, value in enumerate(hashes)}


def digest(leaves: Leaves) -> str:
    """The SHA-256 of a model: over the sorted lines `name slice sha256`. A pure function of the weights and
    `model.leaves`: the same from a trainer that holds all slices and from tensor-parallel ranks that hold a few each."""
    lines = "".join(f"{name} {i} {value}\n" for (name, i), value in sorted(leaves.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
