"""Finds the key that was meant, and the keys that had another name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

EARLIER = {"trainer.clip_low": "algorithm.clip_low", "trainer.clip_high": "algorithm.clip_high"}
"""Keys of an earlier version, as its checkpoints and config.yaml have them, and where they are now."""
REFUSED: Mapping[str, str] = {
    "adapter.dropout": "a weight that is merged has no dropout, and what is sampled must be what is trained; regularise by a lower "
    "adapter.rank, or trainer.weight_decay"
}
"""Keys that other systems have, and why there is none here."""
ADDED: Mapping[str, Any] = {
    "adapter.rank": 0,
    "adapter.alpha": 32.0,
    "adapter.targets": ["attention", "mlp"],
    "adapter.rslora": False,
    "kernels.family": "auto",
    "mode": "full",
    "batches": None,
    "align.keep_batches": [],
    "algorithm.name": "grpo",
    "algorithm.mini_batches": 1,
    "algorithm.update_epochs": 1,
    "algorithm.sampling_rounds": 1,
    "algorithm.overlong_buffer": 0,
    "algorithm.mask_overlong": False,
    "algorithm.kl_coef": 0.0,
    "algorithm.kl_estimator": "k3",
    "algorithm.kl_in": "loss",
    "algorithm.reference": None,
    "algorithm.entropy_coef": 0.0,
    "warmup.kind": "sft",
    "warmup.beta": 0.1,
    "warmup.chosen": "chosen",
    "warmup.rejected": "rejected",
    "trainer.lr_schedule": "constant",
    "trainer.lr_warmup_steps": 0,
    "trainer.router_aux_loss_coef": 0.0,
    "cluster.patience": 60,
    "eval.samples": 1,
    "eval.keep_samples": False,
    "eval.sets": {},
    "scoring.errors": "fail",
    "scoring.workers": 2,
    "scoring.timeout": 300,
    "scoring.total": 3600,
    "environment.name": "single_turn",
    "environment.factory": None,
    "environment.args": {},
    "environment.max_turns": 8,
    "environment.max_tokens": 1024,
    "environment.format": "auto",
    "environment.timeout": 60,
    "environment.errors": "drop",
    "data.subset": None,
    "data.split": "train",
    "data.held_out": None,
    "data.chat": False,
    "data.system": None,
    "data.tools": None,
    "data.chat_template": None,
    "data.template_args": {},
    "data.curriculum": None,
}
"""Keys that it did not have, and what it did; those of `data` are keys of kind=dataset."""
RENAMED = {("data.kind", "jsonl"): "dataset"}
"""Values that it called otherwise."""

_MEANT = {  # names that other systems have for a key
    "batch_size": ("algorithm.prompts_per_step",),
    "train_batch_size": ("algorithm.prompts_per_step",),
    "num_generations": ("algorithm.group_size",),
    "n": ("algorithm.group_size",),
    "adv_estimator": ("algorithm.advantage",),
    "loss_type": ("algorithm.loss_mean",),
    "loss_agg_mode": ("algorithm.loss_mean",),
    "epsilon": ("algorithm.clip_low",),
    "epsilon_high": ("algorithm.clip_high",),
    "clip_ratio_low": ("algorithm.clip_low",),
    "clip_ratio_high": ("algorithm.clip_high",),
    "ppo_mini_batch_size": ("algorithm.mini_batches",),
    "mini_batch_size": ("algorithm.mini_batches",),
    "steps_per_generation": ("algorithm.mini_batches",),
    "ppo_epochs": ("algorithm.update_epochs",),
    "num_iterations": ("algorithm.update_epochs",),
    "max_num_gen_batches": ("algorithm.sampling_rounds",),
    "filter_groups": ("algorithm.sampling_rounds",),
    "dynamic_sampling": ("algorithm.sampling_rounds",),
    "mask_truncated_completions": ("algorithm.mask_overlong",),
    "beta": ("algorithm.kl_coef",),
    "kl_loss_coef": ("algorithm.kl_coef",),
    "init_kl_coef": ("algorithm.kl_coef",),
    "kl_loss_type": ("algorithm.kl_estimator",),
    "kl_penalty": ("algorithm.kl_estimator",),
    "use_kl_loss": ("algorithm.kl_in",),
    "use_kl_in_reward": ("algorithm.kl_in",),
    "ref_model": ("algorithm.reference",),
    "ent_coef": ("algorithm.entropy_coef",),
    "entropy_coeff": ("algorithm.entropy_coef",),
    "teacher_model": ("algorithm.teacher",),
    "teacher_model_name_or_path": ("algorithm.teacher",),
    "max_tokens": ("rollout.max_new_tokens",),
    "max_completion_length": ("rollout.max_new_tokens",),
    "max_prompt_length": ("data.max_prompt_tokens",),
    "max_steps": ("steps",),
    "epochs": ("steps",),
    "lr_scheduler_type": ("trainer.lr_schedule",),
    "warmup_steps": ("trainer.lr_warmup_steps",),
    "lr_scheduler": ("trainer.lr_schedule",),
    "max_grad_norm": ("trainer.grad_clip",),
    "lora_r": ("adapter.rank",),
    "lora_rank": ("adapter.rank",),
    "lora_alpha": ("adapter.alpha",),
    "target_modules": ("adapter.targets",),
    "lora_target_modules": ("adapter.targets",),
    "use_rslora": ("adapter.rslora",),
    "model_name_or_path": ("model.path",),
    "dataset": ("data.path",),
    "dataset_name": ("data.path",),
    "dataset_config": ("data.subset",),
    "train_files": ("data.path",),
    "prompt_data": ("data.path",),
    "val_files": ("data.held_out",),
    "eval_dataset": ("data.held_out", "eval.sets"),
    "dataset_train_split": ("data.split",),
    "dataset_test_split": ("data.held_out",),
    "prompt_split": ("data.split",),
    "prompt_key": ("data.question",),
    "input_key": ("data.question",),
    "label_key": ("data.answer",),
    "input_template": ("data.prompt",),
    "tool_key": ("data.tools",),
    "apply_chat_template": ("data.chat",),
    "system_prompt": ("data.system",),
    "chat_template_kwargs": ("data.template_args",),
    "apply_chat_template_kwargs": ("data.template_args",),
    "environment_factory": ("environment.factory",),
    "max_tool_calling_iterations": ("environment.max_turns",),
    "max_assistant_turns": ("environment.max_turns",),
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
    for (key, said), meant in RENAMED.items():
        section, name = key.split(".")
        if isinstance(new.get(section), dict) and new[section].get(name) == said:
            new[section][name] = meant
    for key, value in ADDED.items():
        section, _, name = key.partition(".")
        if not name:
            new.setdefault(section, value)
            continue
        mine = new.setdefault(section, {})
        if isinstance(mine, dict) and (section != "data" or mine.get("kind") == "dataset"):
            new[section].setdefault(name, value)
    return new


def _alike(name: str, keys: Sequence[str]) -> list[str]:
    names = {key.rpartition(".")[2]: key for key in reversed(keys)}
    return [names[close] for close in difflib.get_close_matches(name, names, 1, cutoff=0.7)]
