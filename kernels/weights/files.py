"""Weights in the safetensors files of a Hugging Face model directory: found, read whole or by rows, and written."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open

from kernels.model import ConfigError, ModelConfig, Parameter, Weight, saved
from kernels.model.parameter import SCALES_IN_FILES
from kernels.ops import Quantized
from kernels.ops.quantize import BLOCK, FP8
from kernels.weights.beside import Beside, Contract
from kernels.weights.stored import INDEX, SINGLE, Stored, stored_tensors
from kernels.weights.tensor_file import write_tensors

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = "F8_E4M3"  # as safetensors names it


def find(config: ModelConfig, directory: str | Path) -> dict[str, Path]:
    """Finds the safetensors file of every tensor that `config` asks for. ConfigError: a file that cannot be read, a
    tensor that is missing, has another shape or is quantized, or one inside a layer that no parameter reads. Reads
    headers only."""
    stored = stored_tensors(Path(directory))
    for parameter in saved(config):
        columns = (parameter.columns,) if parameter.columns else ()
        for name, rows in zip(parameter.hf_names, parameter.stored, strict=True):
            if name not in stored:
                raise ConfigError(f"{directory} has no tensor {name}, which the config asks for")
            tensor = stored[name]
            if tensor.shape != (rows, *columns):
                raise ConfigError(f"{tensor.path}: {name} is {tensor.shape}, the config says {(rows, *columns)}")
            if tensor.dtype == _FP8 and config.quantizes(parameter):
                _check_scales(stored, name, tensor.shape)
            elif tensor.dtype not in _FLOATS:
                raise ConfigError(f"{tensor.path}: {name} is {tensor.dtype}; taken are {', '.join(_FLOATS)}")
    where = {name: tensor.path for name, tensor in stored.items()}
    _check_unread(config, where)
    return where


def _check_scales(stored: Mapping[str, Stored], name: str, shape: tuple[int, ...]) -> None:
    """Refuses an FP8 tensor without one scale for each of its blocks."""
    path, scales = stored[name].path, stored.get(name + SCALES_IN_FILES)
    if scales is None:
        raise ConfigError(f"{path}: {name} is {_FP8}, and no file has its {name + SCALES_IN_FILES}")
    blocks = tuple(n // BLOCK for n in shape)
    if scales.shape != blocks or scales.dtype not in _FLOATS:
        raise ConfigError(
            f"{scales.path}: {name + SCALES_IN_FILES} is {scales.dtype} {scales.shape}; of {shape} in blocks of {BLOCK} it "
            f"must be {blocks}, one of {', '.join(_FLOATS)}"
        )


def _check_unread(config: ModelConfig, where: Mapping[str, Path]) -> None:
    """Refuses a bias or a norm inside a layer of the config: it would change its numbers; other heads and further
    layers would not."""
    read = {name for parameter in saved(config) for name in parameter.hf_names}
    read |= {name + SCALES_IN_FILES for p in saved(config) if config.quantizes(p) for name in p.hf_names}
    layer = re.compile(r"model\.layers\.(\d{1,9})\.(?!.*\.inv_freq$)")
    for name in sorted(where.keys() - read):
        if (match := layer.match(name)) and int(match[1]) < config.layers:
            raise ConfigError(f"{where[name]} holds {name}, which a {config.model_type} of this config has no use for")


def load(
    config: ModelConfig, directory: str | Path, change: Callable[[str, torch.Tensor], torch.Tensor] | None = None
) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Reads every parameter from the safetensors files of a Hugging Face model directory, one at a time; what they hold as FP8
    is float32, value x scale. `change`: what is done to each of its tensors, by name (`kernels.weights.adapters`)."""
    where = find(config, directory)
    for parameter in saved(config):
        yield parameter, _whole(where, parameter, change)


def load_as_stored(config: ModelConfig, directory: str | Path) -> Iterator[tuple[Parameter, Weight]]:
    """Reads the same; a projection that the files hold as FP8 is `Quantized`, its values and scales as they are there."""
    where = find(config, directory)
    for parameter in saved(config):
        values = [_stored(where, name) for name in parameter.hf_names] if config.quantizes(parameter) else []
        if {tensor.dtype for tensor in values} == {FP8}:
            scales = [_stored(where, name).float() for name in parameter.scales.hf_names]
            yield parameter, Quantized(torch.cat(values), torch.cat(scales))
        else:
            yield parameter, _whole(where, parameter)


def _stored(where: Mapping[str, Path], name: str) -> torch.Tensor:
    with safe_open(where[name], "pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


def _whole(
    where: Mapping[str, Path],
    parameter: Parameter,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Reads a parameter, FP8 multiplied out, as it is held."""
    tensors = [_multiplied_out(where, name, _stored(where, name), 0) for name in parameter.hf_names]
    if change:
        tensors = [change(name, tensor) for name, tensor in zip(parameter.hf_names, tensors, strict=True)]
    return parameter.from_files(torch.cat(tensors))


def read_rows(where: Mapping[str, Path], parameter: Parameter, start: int, stop: int) -> torch.Tensor:
    """Reads rows start .. stop of `parameter`, from the files that `find` found, and no others: nothing is whole in memory."""
    if parameter.stripe:
        return _read_stripes(where, parameter, start, stop)
    pieces, first = [], 0
    for name, rows in zip(parameter.hf_names, parameter.stored, strict=True):
        a, b = max(start, first) - first, min(stop, first + rows) - first
        if a < b:
            pieces.append(_read(where, name, a, b))
        first += rows
    if stop > first:
        pieces.append(torch.zeros(stop - max(start, first), *parameter.shape[1:]))
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def _read_stripes(where: Mapping[str, Path], parameter: Parameter, start: int, stop: int) -> torch.Tensor:
    """Reads the rows of each pair of tensors between whole stripes, and cuts what is too much."""
    pieces, turn, pair = [], 2 * parameter.stripe, 2 * parameter.stored[0]
    for i in range(start // pair, -(-stop // pair)):
        a, b = max(start - i * pair, 0), min(stop - i * pair, pair)
        first, last = a // turn, -(-b // turn)
        rows = first * parameter.stripe, last * parameter.stripe
        both = [_read(where, name, *rows) for name in parameter.hf_names[2 * i : 2 * i + 2]]
        turns = torch.stack([part.view(last - first, parameter.stripe, -1) for part in both], 1)
        pieces.append(turns.flatten(0, 2)[a - first * turn : b - first * turn])
    return torch.cat(pieces) if pieces else torch.zeros(0, parameter.columns)


def _read(where: Mapping[str, Path], name: str, start: int, stop: int) -> torch.Tensor:
    with safe_open(where[name], "pt") as file:
        return _multiplied_out(where, name, file.get_slice(name)[start:stop], start)


def _multiplied_out(where: Mapping[str, Path], name: str, rows: torch.Tensor, start: int) -> torch.Tensor:
    """Returns rows from `start` on of a tensor; those of FP8 as value x scale, rounded once to float32."""
    if rows.dtype != FP8:
        return rows
    scales = name + SCALES_IN_FILES
    first, last = start // BLOCK, -(-(start + len(rows)) // BLOCK)
    with safe_open(where[scales], "pt") as file:
        of_blocks = file.get_slice(scales)[first:last].float()
    of_rows = of_blocks.repeat_interleave(BLOCK, 0)[start - first * BLOCK :][: len(rows)]
    return rows.float() * of_rows.repeat_interleave(BLOCK, 1)


def to_hf(parameter: Parameter, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """Cuts a whole parameter into its Hugging Face tensors, by name, without padding."""
    stored = parameter.to_files(whole).split(parameter.stored)
    return {n: t.contiguous() for n, t in zip(parameter.hf_names, stored, strict=True)}


def save(
    config: ModelConfig,
    whole: Iterable[tuple[Parameter, torch.Tensor]],
    directory: str | Path,
    dtype: torch.dtype | None = None,
    file_bytes: int = 5 * 10**9,
    beside: Beside | None = None,
) -> None:
    """Writes a Hugging Face model directory that `transformers` loads: model.safetensors or, where that would exceed
    `file_bytes`, numbered files and their index, and what stands beside them: config.json with the contract, and what
    is said of tokens.

    `whole`: every parameter, in the order of `saved`, one in memory at a time; rounded to `dtype` (None: that of the
    first). `beside` (None: nothing is known of tokens, and the contract is that of `dtype`).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arriving = iter(whole)
    first = next(arriving)
    dtype = dtype or first[1].dtype
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for parameter in saved(config):
        for name, rows in zip(parameter.hf_names, parameter.stored, strict=True):
            shape = (rows, *parameter.shape[1:])
            size += prod(shape) * dtype.itemsize
            if size > file_bytes and files[-1]:
                files.append({})
                size = prod(shape) * dtype.itemsize
            files[-1][name] = shape
    tensors = (item for p, tensor in chain([first], arriving) for item in to_hf(p, tensor.to(dtype)).items())
    count, where = len(files), dict[str, str]()
    for i, shapes in enumerate(files, 1):
        name = f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE
        write_tensors(directory / name, shapes, dtype, islice(tensors, len(shapes)))
        where |= dict.fromkeys(shapes, name)
    if count > 1:
        total = sum(prod(shape) for shapes in files for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (beside or Beside(Contract.of(config, dtype))).write(config, dtype, directory)
