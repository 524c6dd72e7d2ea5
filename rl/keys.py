"""Finds the key that was meant."""

import difflib
from collections.abc import Sequence

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
    "save_steps": ("checkpoint.every",),
    "eval_steps": ("eval.every",),
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


def _alike(name: str, keys: Sequence[str]) -> list[str]:
    names = {key.rpartition(".")[2]: key for key in reversed(keys)}
    return [names[close] for close in difflib.get_close_matches(name, names, 1, cutoff=0.7)]
