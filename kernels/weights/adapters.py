"""Adapters in the format of `peft`: adapter_config.json and adapter_model.safetensors, read, written, and merged.

A module is a matrix of a Hugging Face model with its A [r, K], B [N, r] and scale: W' = W + scale B A by the one definition of
the merge (`kernels.ops.merge_low_rank`), of W rounded to the dtype that it is used in.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kernels.model import Adapter, ConfigError, ModelConfig, Parameter, served
from kernels.model.parameter import Target
from kernels.ops import merge_low_rank
from kernels.weights.beside import read_json
from kernels.weights.files import load
from kernels.weights.tensor_file import write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ENDS = (".lora_A.weight", ".lora_B.weight")
_OFF: dict[str, tuple[Any, ...]] = {  # fields that would change numbers, and what they must be
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "trainable_token_indices": (None, [], {}),
}


@dataclass(frozen=True)
class Module:
    """Holds the adapter of one Hugging Face matrix, float32."""

    a: torch.Tensor  # [r, K]
    b: torch.Tensor  # [N, r]
    scale: float


Modules = dict[str, Module]
"""By the name of the matrix in a file of weights."""


def modules_of(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> Modules:
    """Cuts the A and B that a trainer holds, by name, into those of Hugging Face matrices."""
    adapter, out = config.adapter, Modules()
    assert adapter is not None
    for parameter in served(config):
        if rank := adapter.rank(parameter):
            a_held, b_held = adapter.tensors(parameter)
            of_a = tensors[a_held.name].chunk(len(parameter.matrices))
            of_b = b_held.to_files(tensors[b_held.name]).split(parameter.stored)
            for name, a, b in zip(parameter.hf_names, of_a, of_b, strict=True):
                out[name] = Module(a[:rank], b[:, :rank], adapter.scale(parameter))
    return out


def merged(modules: Modules, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Returns what `kernels.weights.files.load` does to a tensor: rounds it to `dtype` and merges its adapter, if any."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        held, module = tensor.to(dtype), modules.get(name)
        return held if module is None else merge_low_rank(held, module.a, module.b, module.scale, dtype)

    return change


def load_merged(
    config: ModelConfig, directory: str | Path, modules: Modules, dtype: torch.dtype
) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Reads every parameter of a model directory, with its adapters merged, in `dtype`, one at a time."""
    return load(config, directory, merged(modules, dtype))


def write(directory: Path, config: ModelConfig, tensors: Mapping[str, torch.Tensor], base: str) -> None:
    """Writes the A and B that a trainer holds into a folder that `peft` loads. `base`: the model directory under them."""
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, torch.Tensor] = {}
    for name, module in modules_of(config, tensors).items():
        files |= dict(zip((_key(name, end) for end in _ENDS), (module.a, module.b), strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in files.items()}
    write_tensors(directory / WEIGHTS, shapes, torch.float32, files.items())
    fields = _fields(config, base)
    (directory / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _key(name: str, end: str) -> str:
    return _PREFIX + name.removesuffix(".weight") + end


def _fields(config: ModelConfig, base: str) -> dict[str, Any]:
    """Returns adapter_config.json: one rank, and a pattern of those of other targets. A mixture of experts names its modules
    whole: there a bare gate_proj means an expert's."""
    adapter = config.adapter
    assert adapter is not None
    ranks: dict[str, int] = {}
    for parameter in served(config):
        if rank := adapter.rank(parameter):
            for name in parameter.hf_names:
                module = name.removesuffix(".weight")
                ranks[module.removeprefix("model.") if config.experts else module.rpartition(".")[2]] = rank
    first = dict(adapter.ranks).get("experts") or next(iter(ranks.values()))  # `peft` fuses experts by r alone
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": first,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != first},
        "lora_alpha": adapter.alpha,
        "alpha_pattern": {},
        "use_rslora": adapter.rslora,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def read(directory: str | Path, config: ModelConfig) -> Modules:
    """Reads the adapters of a folder that `peft` or `write` wrote, for a model. ConfigError names what cannot be used."""
    folder = Path(directory)
    fields = read_json(folder / CONFIG)
    if fields.get("peft_type") != "LORA":
        raise ConfigError(f"{folder / CONFIG}: peft_type={fields.get('peft_type')!r}; adapters here are LORA")
    for name, allowed in _OFF.items():
        if name in fields and fields[name] not in allowed:
            raise ConfigError(f"{folder / CONFIG}: {name}={fields[name]!r} is not supported; it must be {allowed[0]!r}")
    there = {hf: p for p in served(config) for hf in p.hf_names if p.columns}
    pairs = _pairs(folder, there)
    return {name: Module(a, b, _scale(fields, name, a.shape[0], folder / CONFIG)) for name, (a, b) in pairs.items()}


def adapter_of(directory: str | Path, config: ModelConfig) -> Adapter:
    """Returns the adapter that a folder holds, for a run that trains it further. ConfigError where it is of another kind than a
    run trains: of a part of a target's matrices, of several ranks in one target, or of several alphas."""
    modules, fields = read(directory, config), read_json(Path(directory) / CONFIG)
    ranks: dict[Target, int] = {}
    for parameter in served(config):
        for name in parameter.hf_names:
            module, target = modules.get(name), parameter.target
            if module and target is None:
                raise ConfigError(f"{directory} has an adapter of {name}, which is served and merged, and not trained")
            if module and target and ranks.setdefault(target, len(module.a)) != len(module.a):
                raise ConfigError(
                    f"{directory}: rank {len(module.a)} of {name}, and {ranks[target]} of others of {target}; a run trains "
                    f"one rank a target"
                )
    adapter = Adapter(tuple(ranks.items()), float(fields["lora_alpha"]), bool(fields.get("use_rslora")))
    for parameter in served(config):
        if not adapter.rank(parameter):
            continue
        for name in parameter.hf_names:
            if name not in modules:
                raise ConfigError(
                    f"{directory} has adapters of {parameter.target}, and none of {name}: a run trains all matrices of a target"
                )
            if modules[name].scale != adapter.scale(parameter):
                raise ConfigError(
                    f"{directory}: {name} is scaled by {modules[name].scale:g}, alpha {adapter.alpha:g} of rank "
                    f"{adapter.rank(parameter)} means {adapter.scale(parameter):g}; a run trains one alpha"
                )
    return adapter


def held(config: ModelConfig, modules: Modules) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every A and B by name, float32, as a trainer of the adapter of `config` holds them: undoes `modules_of`."""
    adapter = config.adapter
    assert adapter is not None
    for parameter in served(config):
        if not adapter.rank(parameter):
            continue
        a_held, b_held = adapter.tensors(parameter)
        of_a, rank = torch.zeros(a_held.shape), b_held.columns
        for name, a in zip(parameter.hf_names, of_a.chunk(len(parameter.matrices)), strict=True):
            a[: len(modules[name].a)] = modules[name].a
        files = [torch.nn.functional.pad(b, (0, rank - b.shape[1])) for b in (modules[n].b for n in parameter.hf_names)]
        yield a_held.name, of_a
        yield b_held.name, b_held.from_files(torch.cat(files)).contiguous()


def adapter_sha256(directory: str | Path) -> str:
    """Returns the SHA-256 of the adapters in a folder, by name, as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(Path(directory) / WEIGHTS).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads what a file holds, float32."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a readable safetensors file: {error}") from None


def _pairs(folder: Path, there: Mapping[str, Parameter]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns (A, B) of each matrix, checked against the model's."""
    path = folder / WEIGHTS
    found = _tensors(path)
    names = sorted({key.removesuffix(end) for key in found for end in _ENDS if key.endswith(end)})
    if not names:
        raise ConfigError(f"{path} holds no lora_A.weight and lora_B.weight")
    for key in found:
        if not key.endswith(_ENDS):
            raise ConfigError(f"{path} holds {key}, which is neither a lora_A.weight nor a lora_B.weight of a matrix")
    out = {}
    for module in names:
        name = module.removeprefix(_PREFIX) + ".weight"
        parameter = there.get(name)
        if parameter is None or not module.startswith(_PREFIX) or name == "model.embed_tokens.weight":
            raise ConfigError(f"{path} holds an adapter of {module}, which the model has no matrix for that takes one")
        both = [found.get(module + end) for end in _ENDS]
        rows = parameter.stored[parameter.hf_names.index(name)]
        out[name] = _checked(f"{path}: {module}", both, rows, parameter.columns)
    return out


def _checked(where: str, both: list[torch.Tensor | None], rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = both
    if a is None or b is None:
        raise ConfigError(f"{where} has only one of lora_A and lora_B")
    if a.dim() != 2 or a.shape[1] != columns or b.shape != (rows, a.shape[0]):
        raise ConfigError(
            f"{where}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a matrix of {(rows, columns)}"
        )
    return a.contiguous(), b.contiguous()


def _scale(fields: Mapping[str, Any], name: str, rank: int, path: Path) -> float:
    """Returns alpha / rank, or with rsLoRA alpha / sqrt(rank); the patterns name modules by their ends."""
    module = name.removesuffix(".weight")

    def said(pattern: str, otherwise: str) -> Any:
        patterns = fields.get(pattern) or {}
        ends = [key for key in patterns if module == key or module.endswith("." + key)]
        return patterns[ends[0]] if ends else fields.get(otherwise)

    alpha, r = said("alpha_pattern", "lora_alpha"), said("rank_pattern", "r")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ConfigError(f"{path}: lora_alpha={alpha!r} must be a number")
    if r != rank:
        raise ConfigError(f"{path} says rank {r!r} for {module}, whose tensors have {rank}")
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
