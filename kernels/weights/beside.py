"""What stands in a model directory beside its weights: config.json with the contract, and what is said of tokens."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kernels.model.config import ModelConfig
from kernels.model.fields import CONTRACT, TOKENS, ConfigError, shown
from kernels.model.formats import FORMATS, PLAIN, Format
from kernels.tree import is_power_of_two

VERSION = 2
"""Of the arithmetic. It rises with a change of code that changes bits: the same weights then have other log-probs."""
LEAVES = 8
"""Of a model that says nothing of them."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def name_of(dtype: torch.dtype) -> str:
    """Names a dtype as config.json does: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a file, or ConfigError."""
    try:
        if path.exists() and not path.is_file():  # a pipe is read for ever
            raise ConfigError(f"{path} is no file")
        value = json.loads(path.read_text("utf-8"))
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: a model directory holds a {path.name}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:  # no UTF-8, or a number of thousands of digits
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


@dataclass(frozen=True)
class Contract:
    """Says what decides the bits of a model's log-probs beside its weights: whoever loads it computes so unless told
    otherwise."""

    leaves: int  # of every contraction
    dtype: str  # of activations, and of the weights as they are used: a key of DTYPES
    version: int = VERSION
    format: Format = PLAIN  # of the projections

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype) -> "Contract":
        """Makes the contract of a model's leaves and format, and a dtype."""
        return cls(config.leaves, name_of(dtype), format=config.format)

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> "Contract | None":
        """Reads it from the fields of a config.json; None where they say nothing of it."""
        said = config.get(CONTRACT)
        if said is None:
            return None
        names = ("leaves", "dtype", "contract")
        parts: list[Any] = [said.get(name) for name in names] if isinstance(said, dict) else [None] * 3
        leaves, dtype, version = parts
        format: Any = said.get("format", PLAIN) if isinstance(said, dict) else None
        whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31 for n in (leaves, version))
        known = isinstance(dtype, str) and dtype in DTYPES and isinstance(format, str) and format in (PLAIN, *FORMATS)
        if not whole or not is_power_of_two(leaves) or not known:
            raise ConfigError(
                f"{path}: {CONTRACT}={shown(said)} is no contract; one is {{'contract': 1, 'leaves': 8, 'dtype': 'float32'}}"
            )
        return cls(leaves, dtype, version, format)

    def fields(self) -> dict[str, Any]:
        """Returns the contract's fields as config.json has them."""
        own = {"contract": self.version, "leaves": self.leaves, "dtype": self.dtype}
        return {CONTRACT: own if self.format == PLAIN else own | {"format": self.format}}

    def departures(
        self, other: "Contract", leaves: str = "leaves", dtype: str = "dtype", format: str = "format"
    ) -> list[str]:
        """Returns what `other` has otherwise, one line each."""
        pairs = (
            ("the version of the arithmetic", self.version, other.version),
            (leaves, self.leaves, other.leaves),
            (dtype, self.dtype, other.dtype),
            (format, self.format, other.format),
        )
        return [
            f"{name} is {b} and its contract says {a}: its log-probs have other bits" for name, a, b in pairs if a != b
        ]


@dataclass(frozen=True)
class Beside:
    """Holds all of a model directory but its weights and its shape."""

    contract: Contract
    fields: Mapping[str, Any] = field(default_factory=dict)  # of config.json, what is said of tokens: some of TOKENS
    files: Mapping[str, bytes] = field(default_factory=dict)  # others, by their path in the directory

    @classmethod
    def read(cls, directory: Path) -> "Beside":
        """Reads it from a directory that `contents` describe."""
        config = read_json(directory / "config.json")
        contract = Contract.read(config, directory / "config.json")
        if contract is None:
            raise ConfigError(f"{directory / 'config.json'} has no {CONTRACT}")
        paths = [p for p in sorted(directory.rglob("*")) if p.is_file() and p != directory / "config.json"]
        files = {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}
        return cls(contract, {name: config[name] for name in TOKENS if name in config}, files)

    def computed_in(self, dtype: str) -> "Beside":
        """Returns a copy whose contract names another dtype."""
        return replace(self, contract=replace(self.contract, dtype=dtype))

    def contents(self, config: ModelConfig, dtype: torch.dtype) -> dict[str, bytes]:
        """Returns every file but the weights, which are in `dtype`."""
        fields = config.to_hf(name_of(dtype)) | dict(self.fields) | self.contract.fields()
        return {**self.files, "config.json": (json.dumps(fields, indent=2) + "\n").encode()}

    def write(self, config: ModelConfig, dtype: torch.dtype, directory: Path) -> None:
        """Writes config.json and all other files into a model directory."""
        for name, content in self.contents(config, dtype).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
