"""A Hugging Face model directory as both sides read it: its shape, its contract, its tensors, and what it says of tokens."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from kernels.model.config import ModelConfig
from kernels.model.fields import TOKENS, ConfigError, shown
from kernels.model.formats import FORMATS, PLAIN, Format
from kernels.weights.beside import DTYPES, LEAVES, Contract, read_json
from kernels.weights.files import find
from kernels.weights.published import FIELD, check_converted, format_of
from kernels.weights.stored import check_tied, passed_over

GENERATION = "generation_config.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""A directory with a tokenizer has one of these."""
_TOKEN_FILES = (
    *(*VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json", GENERATION),
)


class ModelFolder:
    """Reads config.json at once, and the rest when it is asked for. Every method raises ConfigError for what it cannot use."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.fields: dict[str, Any] = read_json(self.path / "config.json")
        self.contract = Contract.read(self.fields, self.path / "config.json")
        self.published = format_of(self.fields, self.path / "config.json")
        """The format that its projections are stored in; None: they are plain numbers."""

    @property
    def format(self) -> Format:
        """Returns the format that its files or its contract say its projections are computed in, else plain."""
        return self.published or (self.contract.format if self.contract else PLAIN)

    def asked(
        self, leaves: int | None, dtype: str | None, otherwise: str | None = None, format: str | None = None
    ) -> Contract:
        """Returns the contract to compute by: as asked for, else the model's own, else LEAVES and `otherwise` (None:
        the dtype of its tensors), or bfloat16 in a quantized format."""
        own, chosen = self.contract, self._format(format)
        if chosen != PLAIN and dtype is None and own is None:
            dtype = "bfloat16"
        stored = self.fields.get("dtype") or self.fields.get("torch_dtype") or "float32"
        name = dtype or (own.dtype if own else otherwise or str(stored).removeprefix("torch."))
        if name not in DTYPES:
            raise ConfigError(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)} (dtype=NAME chooses)")
        return Contract(leaves or (own.leaves if own else LEAVES), name, format=chosen)

    def _format(self, asked: str | None) -> Format:
        if asked is not None and asked not in (PLAIN, *FORMATS):
            raise ConfigError(f"format {asked!r} is not supported; supported: {', '.join((PLAIN, *FORMATS))}")
        if self.published and asked not in (None, self.published):
            raise ConfigError(
                f"{self.path} holds its projections as {self.published}: they cannot be computed as {asked}; leave the format "
                "out"
            )
        return asked or self.format  # type: ignore[return-value]

    def remarks(
        self, contract: Contract, leaves: str = "leaves", dtype: str = "dtype", format: str = "format"
    ) -> list[str]:
        """Lists the lines that whoever loads the model is to be told: where `contract` is not its own, and which file is
        passed over. `leaves`, `dtype`, `format`: what the user calls them."""
        other = self.contract.departures(contract, leaves, dtype, format) if self.contract else []
        return [*(f"{self.path}: {line}" for line in other), *filter(None, [passed_over(self.path)])]

    def model(self, leaves: int | None = None, format: str | None = None) -> ModelConfig:
        """Returns its shape; `leaves`, `format` as of `asked`."""
        path = self.path / "config.json"
        number = leaves or (self.contract.leaves if self.contract else LEAVES)
        fields = {name: value for name, value in self.fields.items() if name != FIELD}
        told = lambda field, value: f"{path}: {field} is {value}; it"  # noqa: E731
        config = ModelConfig.from_hf(fields, number, told, self._format(format))
        check_converted(config, self.fields, path)
        return config

    def tensors(self, config: ModelConfig) -> dict[str, Path]:
        """Returns the file of each tensor that `config` asks for."""
        where = find(config, self.path)
        check_tied(config, where)
        return where

    @cached_property
    def generation(self) -> dict[str, Any]:
        """Reads generation_config.json; empty where there is none."""
        path = self.path / GENERATION
        return read_json(path) if path.exists() else {}

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Lists the ids that end a text by generation_config.json, in its order, then by config.json. A tokenizer may name
        another."""
        said = end_ids(self.generation, self.path / GENERATION) + end_ids(self.fields, self.path / "config.json")
        return tuple(dict.fromkeys(said))

    @property
    def token_fields(self) -> dict[str, Any]:
        """Returns the fields of config.json that say something of tokens."""
        return {name: self.fields[name] for name in TOKENS if name in self.fields}

    def token_files(self) -> dict[str, bytes]:
        """Returns the other files that do, as they are, by path."""
        templates = sorted((self.path / "additional_chat_templates").glob("*.jinja"))
        paths = [p for p in (*(self.path / name for name in _TOKEN_FILES), *templates) if p.exists()]
        return {p.relative_to(self.path).as_posix(): _content(p) for p in paths}


def _content(path: Path) -> bytes:
    """Reads a file that can be what its name says."""
    if path.suffix == ".json":
        read_json(path)
    try:
        if not path.is_file():
            raise ConfigError(f"{path} is no file")
        content = path.read_bytes()
        if path.suffix in (".jinja", ".txt"):
            content.decode("utf-8")
        return content
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def end_ids(fields: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    """Returns what `eos_token_id` of the file `path` says; ConfigError where it is no id."""
    value = fields.get("eos_token_id")
    found = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise ConfigError(f"{path}: eos_token_id is {shown(value)}; it must be an id, or a list of some")
    return tuple(i for i in found if i >= 0)  # -1 is how some say that there is none
