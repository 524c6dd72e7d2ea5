"""Says what makes a run the run it is: every value that decides a bit of its weights, and none that does not."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from kernels.device import family_of
from kernels.gpu.card import card_of
from kernels.weights.adapters import adapter_sha256
from kernels.weights.beside import VERSION, name_of
from rl.config import RunConfig
from rl.data import Source
from rl.hosted.asked import by_transformers
from rl.keys import ADDED, EARLIER, RENAMED

FREE = (  # how a run is computed, and what it leaves; a resumed one may choose anew
    "adapter.path",  # ADAPTER says what is there
    "adapter.publish",
    "algorithm.reference",  # the digest of the weights is compared, as is the next one's (`rl/frozen_weights.py`)
    "algorithm.teacher",
    "align",
    "batches",
    "checkpoint",
    "cluster",
    "data.chat_template",  # CONTENT says what is there, and what was made of it
    "data.held_out",
    "data.path",
    "data.split",
    "data.subset",
    "dry_run",
    "environment.errors",
    "environment.timeout",
    "eval.every",
    "eval.keep_samples",
    "eval.sets",
    "kernels",  # FAMILY says which they are
    "logger",
    "out_dir",
    "resume",
    "rollout.max_batch_tokens",
    "rollout.max_running",
    "rollout.page_size",
    "rollout.pages",
    "rollout.prefill_chunk",
    "rollout.prefix_cache",
    "rollout.replicas",
    "rollout.speculate",
    "rollout.threads",
    "rollout.tp",
    "save_model",
    "scoring",
    "steps",
    "trainer.checkpointing",
    "trainer.micro_leaves",
    "trainer.micro_tokens",
    "trainer.offload",
    "trainer.replicas",
    "trainer.threads",
    "trainer.world_size",
)
_SOURCE = re.compile(r"^data\.sources\.[^.]+\.")  # the keys of a mixture's sources are those of `data`
CONTENT = "the data's content (sha256)"
ROWS = "the other fields of the data (sha256)"
ADAPTER = "the adapters that are trained further (sha256)"
ENDS = "the ids that end a completion"
ARITHMETIC = "the version of the arithmetic"
FAMILY = "the family of the GPU kernels"
BY_OTHERS = "what transformers computes"


def identity(config: RunConfig, source: Source | None = None) -> dict[str, Any]:
    """Returns dotted keys and their values, as JSON has them; with `source`, what it trains on, what ends an answer, and of
    which version the arithmetic is."""
    values = config.model_dump(mode="json")
    values["model"]["dtype"] = name_of(config.dtype)
    flat = {k: v for k, v in _flatten(values, "") if not is_free(k)}
    if config.trainer.lr_schedule != "constant":
        flat["steps"] = config.steps
    if source is None:
        return flat
    rows = {ROWS: source.rows_sha256} if source.rows_sha256 else {}
    if config.device == "cuda" and not config.dry_run and (family := family_of_run(config)) != "hopper":
        flat[FAMILY] = family
    if versions := by_transformers(config):
        flat[BY_OTHERS] = ", ".join(f"{name} {version}" for name, version in versions.items())
    if config.adapter.path:
        flat[ADAPTER] = adapter_sha256(config.adapter.path)
    return flat | {CONTENT: _checksum(source), **rows, ENDS: list(source.tokenizer.ends), ARITHMETIC: VERSION}


def family_of_run(config: RunConfig) -> str:
    """Returns the family of the kernels that a run on GPUs runs."""
    chosen = config.kernels.family
    return family_of(card_of(torch.device("cuda"))) if chosen == "auto" else chosen


def difference(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Names the first field of both whose values differ, with both values; "" where they are one run."""
    # What says nothing of the arithmetic is older than its second version
    said = {EARLIER.get(key, key): v for key, v in theirs.items()}
    said |= {key: value for (key, old), value in RENAMED.items() if said.get(key) == old}
    theirs = {ARITHMETIC: 1, **{key: value for key, value in ADDED.items() if key in mine}, **said}
    for key in mine:
        if key in theirs and theirs[key] != mine[key]:
            return f"{key}={_short(theirs[key])} there, {key}={_short(mine[key])} here"
    for key in sorted(set(mine) ^ set(theirs)):
        # A checkpoint of an earlier version may lack these
        if key not in (CONTENT, ROWS, ENDS, ARITHMETIC, BY_OTHERS) and not is_free(key):
            there, here = (_short(v[key]) if key in v else "unknown" for v in (theirs, mine))
            return f"{key}={there} there, {key}={here} here"
    return ""


def is_free(key: str) -> bool:
    """Tells whether a key decides no bit: a run that goes on may have another value."""
    key = _SOURCE.sub("data.", key)
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _flatten(values: Mapping[str, Any], path: str) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        out += _flatten(value, f"{path}{key}.") if isinstance(value, Mapping) else [(f"{path}{key}", value)]
    return out


def _checksum(source: Source) -> str:
    digest = hashlib.sha256()
    for problems in (source.train, source.held_out):
        for p in problems:
            digest.update(json.dumps([p.prompt_ids, p.answer, p.solution]).encode())
    return digest.hexdigest()
