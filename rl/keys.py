"""Finds the key that was meant, and the keys that had another name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

EARLIER = {"trainer.clip_low": "algorithm.clip_low", "trainer.clip_high": "algorithm.clip_high"}
"""Keys of an earlier version, as its checkpoints and config.yaml have them, and where they are now."""
REFUSED: Mapping[str, str] = {
    "adapter.dropout": "a weight that is merged has no dropout, and what is sampled must be what is trained; regularise by a "
    "lower adapter.rank, or by trainer.weight_decay"
}
"""Keys that other systems have, and why there is none here."""
ADDED: Mapping[str, Any] = {
    "adapter.path": None,
    "adapter.publish": "auto",
    "adapter.rank": 0,
    "adapter.alpha": 32.0,
    "adapter.targets": ["attention", "mlp"],
    "adapter.rslora": False,
    "kernels.family": "auto",
    "rollout.carry": 0,
    "model.format": "plain",
    "mode": "full",
    "batches": None,
    "align.keep_batches": [],
    "align.every": 1,
    "algorithm.name": "grpo",
    "algorithm.mini_batches": 1,
    "algorithm.update_epochs": 1,
    "algorithm.sampling_rounds": 1,
    "algorithm.lag": 0,
    "algorithm.overlong_buffer": 0,
    "algorithm.mask_overlong": False,
    "algorithm.kl_coef": 0.0,
    "algorithm.kl_estimator": "k3",
    "algorithm.kl_in": "loss",
    "algorithm.reference": None,
    "algorithm.device_map": None,
    "algorithm.entropy_coef": 0.0,
    "warmup.kind": "sft",
    "warmup.beta": 0.1,
    "warmup.chosen": "chosen",
    "warmup.rejected": "rejected",
    "trainer.lr_schedule": "constant",
    "trainer.lr_warmup_steps": 0,
    "trainer.router_aux_loss_coef": 0.0,
    "cluster.patience": 60,
    "cluster.nodes": None,
    "cluster.interface": None,
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

_CALLED = {  # by key: names that other systems have for it
    "adapter.rank": "lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.targets": "target_modules lora_target_modules",
    "adapter.rslora": "use_rslora",
    "adapter.path": "lora_path adapter_name_or_path lora_adapter_path",
    "steps": "max_steps epochs",
    "algorithm.prompts_per_step": "batch_size train_batch_size",
    "algorithm.group_size": "num_generations n",
    "algorithm.advantage": "adv_estimator",
    "algorithm.loss_mean": "loss_type loss_agg_mode",
    "algorithm.clip_low": "epsilon clip_ratio_low",
    "algorithm.clip_high": "epsilon_high clip_ratio_high",
    "algorithm.mini_batches": "ppo_mini_batch_size mini_batch_size steps_per_generation",
    "algorithm.update_epochs": "ppo_epochs num_iterations",
    "algorithm.sampling_rounds": "max_num_gen_batches filter_groups dynamic_sampling",
    "algorithm.mask_overlong": "mask_truncated_completions",
    "algorithm.kl_coef": "beta kl_loss_coef init_kl_coef",
    "algorithm.kl_estimator": "kl_loss_type kl_penalty",
    "algorithm.kl_in": "use_kl_loss use_kl_in_reward",
    "algorithm.reference": "ref_model",
    "algorithm.entropy_coef": "ent_coef entropy_coeff",
    "algorithm.teacher": "teacher_model teacher_model_name_or_path",
    "rollout.max_new_tokens": "max_tokens max_completion_length",
    "trainer.lr_schedule": "lr_scheduler_type lr_scheduler",
    "trainer.lr_warmup_steps": "warmup_steps",
    "trainer.grad_clip": "max_grad_norm",
    "model.path": "model_name_or_path",
    "data.max_prompt_tokens": "max_prompt_length",
    "data.path": "dataset dataset_name train_files prompt_data",
    "data.subset": "dataset_config",
    "data.held_out": "val_files eval_dataset dataset_test_split",
    "data.split": "dataset_train_split prompt_split",
    "data.question": "prompt_key input_key",
    "data.answer": "label_key",
    "data.prompt": "input_template",
    "data.tools": "tool_key",
    "data.chat": "apply_chat_template",
    "data.system": "system_prompt",
    "data.template_args": "chat_template_kwargs apply_chat_template_kwargs",
    "environment.factory": "environment_factory",
    "environment.max_turns": "max_tool_calling_iterations max_assistant_turns",
    "reward": "reward_fn reward_funcs custom_reward_function",
    "checkpoint.every": "save_steps",
    "eval.sets": "eval_dataset",
    "eval.every": "eval_steps",
    "eval.samples": "num_generations_eval",
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
    meant = [key for key, names in _CALLED.items() if name in names.split() and key in keys]
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
