"""Loads a model directory by transformers, placed by accelerate."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl.lines import short

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate makes itself, of the devices that it sees."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
_WEIGHTS = (".safetensors", ".bin", ".json")


def check_device_map(value: Any) -> None:
    """Raises ValueError, in one line, for what is no device map: a word of AUTOMATIC, a device, or a device of each module."""
    import torch

    known = f"must be {', '.join(AUTOMATIC)}, a device (cpu, cuda:1), or {{module: device}}"
    if value in AUTOMATIC:
        return
    for device in (value.values() or [value]) if isinstance(value, Mapping) else [value]:
        if type(device) is int and device >= 0:
            continue
        try:
            torch.device(device if isinstance(device, str) else "")
        except RuntimeError:
            raise ValueError(f"{known}, and not {device!r}") from None


def loaded(kind: str, path: str, dtype: str, device_map: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Loads the model and its tokenizer; returns them and what transformers tells of the loading. ValueError, in one line, for
    what it cannot load.

    kind        the name of a class of transformers: AutoModelForCausalLM, ...
    path        a model directory, or a name on the hub
    dtype       one of DTYPES; auto: as stored
    device_map  as of transformers ("auto", "cuda:1", {...}), which needs accelerate; None: the CPU
    """
    import torch
    import transformers

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")
    folder = str(Path(path).expanduser())
    if device_map is not None:
        check_device_map(device_map)
    if (("/" in path and path.count("/") > 1) or path.startswith((".", "~"))) and not Path(folder).is_dir():
        raise ValueError(f"{path} is no folder")
    transformers.logging.set_verbosity_error()
    asked = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "output_loading_info": True}
    if device_map is not None:
        asked["device_map"] = device_map
    try:
        model, told = getattr(transformers, kind).from_pretrained(folder, **asked)
        words = transformers.AutoTokenizer.from_pretrained(folder)
    except ImportError as error:
        raise ValueError(f"device_map={device_map} needs accelerate: pip install accelerate ({short(error)})") from None
    except Exception as error:  # of several libraries, for what the folder lacks or the devices
        raise ValueError(f"{path} is no model that transformers loads as {kind}: {short(error)}") from None
    return model.eval(), words, told


def placed(model: Any) -> str:
    """Says which devices hold the model: "cuda:0, cuda:1, cpu"."""
    held = getattr(model, "hf_device_map", None) or {"": model.device}
    return ", ".join(dict.fromkeys(f"cuda:{d}" if isinstance(d, int) else str(d) for d in held.values()))


def digest_of(folder: str) -> str:
    """Computes one SHA-256 of the files of a model directory that say what it computes: weights and configs."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in _WEIGHTS and p.is_file()):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
