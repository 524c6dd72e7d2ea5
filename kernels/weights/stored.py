"""Which tensors a model directory holds, and in which of its files: by its index, where it has one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kernels.model.config import ModelConfig
from kernels.model.fields import ConfigError
from kernels.weights.beside import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_ROWS = 4096  # of two tensors that are compared at once


@dataclass(frozen=True)
class Stored:
    """Describes a tensor in a file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def _headers(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {name: Stored(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a readable safetensors file: {error}") from None


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Lists tensors by name: of a directory with an index those that it names, and no others; else those of all
    .safetensors files, none of which may be in two."""
    if (directory / INDEX).exists():
        return _indexed(directory)
    found: dict[str, Stored] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in _headers(path).items():
            if name in found:
                raise ConfigError(
                    f"{name} is in {found[name].path} and in {path}, and no {INDEX} says which: remove one"
                )
            found[name] = tensor
    if not found:
        raise ConfigError(f"{directory} holds no .safetensors file")
    return found


def _indexed(directory: Path) -> dict[str, Stored]:
    path = directory / INDEX
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise ConfigError(f"{path} must hold a weight_map of tensors and the files beside it that hold them")
    if lost := sorted(file for file in {*files.values()} if not (directory / file).is_file()):
        raise ConfigError(f"{path} names {lost[0]}, which is not there")
    headers = {file: _headers(directory / file) for file in sorted({*files.values()})}
    for name, file in files.items():
        if name not in headers[file]:
            raise ConfigError(f"{directory / file} has no tensor {name}, which {path} says it has")
    return {name: headers[file][name] for name, file in files.items()}


def passed_over(directory: Path) -> str:
    """Returns what to say of a file that is not read here, and that `transformers` takes instead of the index; "" for none."""
    single = directory / SINGLE
    if not single.exists() or any(tensor.path == single for tensor in stored_tensors(directory).values()):
        return ""
    return f"{single} is not read, as {INDEX} does not name it; transformers would read it alone: remove one of the two"


def check_tied(config: ModelConfig, where: Mapping[str, Path]) -> None:
    """Raises ConfigError where a tied model's files hold a head of their own. `where` of `find`."""
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    if not config.tied or head not in where:
        return
    for start in range(0, config.vocab_size, _ROWS):
        rows = slice(start, start + _ROWS)
        with safe_open(where[head], "pt") as one, safe_open(where[embed], "pt") as other:
            if not torch.equal(one.get_slice(head)[rows], other.get_slice(embed)[rows]):
                raise ConfigError(
                    f"{where[head]}: {head} is not {embed}, though the config has tie_word_embeddings=true"
                )
