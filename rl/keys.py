"""Finds the key that was meant, and the keys that had another name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

EARLIER = {"trainer.clip_low": "algorithm.clip_low", "trainer.clip_high": "algorithm.clip_high"}
"""Keys of an earlier version, as its checkpoints and config.yaml have them, and where they are now."""
ADDED = {
    "algorithm.name": "grpo",
    "trainer.router_aux_loss_coef": 0.0,
    "cluster.patience": 60,
    "eval.samples": 1,
    "eval.keep_samples": False,
    "scoring.errors": "fail",
    "scoring.workers": 2,
    "scoring.timeout": 300,
    "scoring.total": 3600,
}
"""Keys that it did not have, and what it did."""

_MEANT = {  # names that other systems have for a key
    "batch_size": ("algorithm.prompts_per_step",),
    "train_batch_size": ("algorithm.prompts_per_step",),
    "num_generations": ("algorithm.group_size",),
    "n": ("algorithm.group_size",),
    "max_tokens": ("rollout.max_new_tokens",),
    "max_completion_length": ("rollout.max_new_tokens",),
    "max_prompt_length": ("data.max_prompt_tokens",),
    "max_steps": ("steps",),
    "epochs": ("steps",),
    "max_grad_norm": ("trainer.grad_clip",),
    "model_name_or_path": ("model.path",),
    "dataset": ("data.path",),
    "reward_fn": ("reward",),
    "reward_funcs": ("reward",),
    "custom_reward_function": ("reward",),
    "save_steps": ("checkpoint.every",),
    "eval_steps": ("eval.every",),
    "num_generations_eval": ("eval.samples",),
    "val_kwargs.n": ("eval.samples",),
}


def nearest(asked: str, keys: Sequence[str]) -> list[str]:
    """Finds the dotted keys that `asked` may stand for, the likeliest first; none where nothing is near.

    A key that is spelt alike, has that name elsewhere, has its initials (learning_rate: lr), or is called so in other systems;
    first one of the section that was asked for.
    """
    section, _, name = asked.lower().rpartition(".")
    last = {key: key.rpartition(".")[2] for key in keys}
    beside = [key for key in keys if key.rpartition(".")[0] == section]
    initials = "".join(word[:1] for word in name.split("_"))
    same = [key for key in keys if last[key] == name]
    short = [key for key in keys if len(initials) > 1 and last[key] == initials]
    meant = [key for key in _MEANT.get(name, ()) if key in keys]
    for found in (_alike(name, beside), same, short, meant, _alike(name, list(keys))):
        if here := [key for key in found if key in beside]:
            return here[:1]
        if found:
            return list(found)[:3]
    return []


def renewed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested `values` of a config.yaml with its `EARLIER` keys where they are now, and with the `ADDED` ones."""
    new = {name: dict(section) if isinstance(section, Mapping) else section for name, section in values.items()}
    for old, now in EARLIER.items():
        (there, key), (here, name) = old.split("."), now.split(".")
        if all(isinstance(new.get(section), dict) for section in (there, here)) and key in new[there]:
            new[here].setdefault(name, new[there].pop(key))
    for key, value in ADDED.items():
        section, name = key.split(".")
        if isinstance(new.setdefault(section, {}), dict):
            new[section].setdefault(name, value)
    return new


def _alike(name: str, keys: Sequence[str]) -> list[str]:
    names = {key.rpartition(".")[2]: key for key in reversed(keys)}
    return [names[close] for close in difflib.get_close_matches(name, names, 1, cutoff=0.7)]
