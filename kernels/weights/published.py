"""Published FP8 checkpoints: what `quantization_config` says of a folder whose projections are block-scaled e4m3."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernels.model import ModelConfig, saved
from kernels.model.fields import ConfigError, shown
from kernels.model.formats import Format
from kernels.ops.quantize import BLOCK

FIELD = "quantization_config"
_TAKEN: dict[str, tuple[Any, ...]] = {  # what is understood, and its values; the first is the usual one
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "weight_block_size": ([BLOCK, BLOCK],),
    "activation_scheme": ("dynamic", None),
    "scale_fmt": (None, "float", "ue8m0"),
}
_EXCEPT = "modules_to_not_convert"


def format_of(fields: Mapping[str, Any], path: Path) -> Format | None:
    """Returns the format that the fields of a config.json say its projections are stored in; None where they are not quantized.
    ConfigError for another quantization than block-scaled e4m3."""
    said = fields.get(FIELD)
    if not said:
        return None
    if not isinstance(said, dict):
        raise ConfigError(f"{path}: {FIELD}={shown(said)} must be an object")
    for name in (*_TAKEN, *said):
        value = said.get(name)
        if name != _EXCEPT and value not in _TAKEN.get(name, (None,)):
            usual = ", ".join(f"{key}={values[0]}" for key, values in _TAKEN.items() if values[0] is not None)
            raise ConfigError(f"{path}: {FIELD} with {name}={shown(value)} is not supported; taken is {usual}")
    if not isinstance(said.get(_EXCEPT) or [], list):
        raise ConfigError(f"{path}: {FIELD}.{_EXCEPT}={shown(said[_EXCEPT])} must be a list of modules")
    return "fp8_block_ue8m0" if said.get("scale_fmt") == "ue8m0" else "fp8_block"


def check_converted(config: ModelConfig, fields: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError where a checkpoint leaves a projection as it was: here a format is of all of them."""
    for left_out in (fields.get(FIELD) or {}).get(_EXCEPT) or []:
        for parameter in saved(config):
            for name in parameter.hf_names if config.quantizes(parameter) else ():
                if f".{left_out!s}." in f".{name}":
                    raise ConfigError(
                        f"{path}: {FIELD}.{_EXCEPT} names {shown(left_out)}, and {name} is a projection: a format is of all "
                        "projections here"
                    )
