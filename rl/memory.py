"""An allocation that failed in a worker, and what to lower, by how much, so that the next one does not."""

import contextlib
from collections.abc import Iterator
from typing import Any

from rl.config import RunConfig
from rl.errors import BAD_INPUT, RunError
from rl.plan import Plan, gib, make_plan


class OutOfMemory(RunError):
    """Says that a worker could not allocate: of `asked` bytes, `free` were there, 0 where nothing says; `advised` says what to
    change."""

    def __init__(self, name: str, asked: int = 0, free: int = 0) -> None:
        super().__init__(name, asked, free)
        self.name, self.asked, self.free = name, asked, free

    def __str__(self) -> str:
        asked = f": {gib(self.asked)} asked for, {gib(self.free)} free" if self.asked else ""
        return f"{self.name} ran out of memory{asked}"


@contextlib.contextmanager
def advised(config: RunConfig, plan: Plan) -> Iterator[None]:
    """Makes a RunError with the advice, in the place of OutOfMemory."""
    try:
        yield
    except OutOfMemory as error:
        raise RunError(f"{error}; {advice(error, config, plan)}") from None


def advice(error: OutOfMemory, config: RunConfig, plan: Plan) -> str:
    """Says what frees enough, of the keys that change no bit of the run."""
    need = max(error.asked - error.free, error.asked // 2, 1)
    choices = _rollout(config, plan, need) if error.name.startswith("rollout") else _trainer(config, plan, need)
    if config.device == "cuda":
        choices.append("end what else uses the card, as nvidia-smi lists it,")
    return f"{' or '.join(choices)} (no bit of the run changes)"


def _trainer(config: RunConfig, plan: Plan, need: int) -> list[str]:
    """The changes that free enough by the plan, the cheapest ones first; where none does, the one that frees most."""
    section = config.trainer
    found: list[tuple[int, str]] = []
    for key, values in _ladder(config):
        now = getattr(section, key)
        for value in values:
            changed = config.model_copy(update={"trainer": section.model_copy(update={key: value})})
            try:
                freed = plan.trainer.peak - make_plan(changed, plan.model, plan.prompt_tokens).trainer.peak
            except BAD_INPUT:  # sizes that do not fit together
                continue
            verb = "set" if isinstance(value, str) else "raise" if value > now else "lower"
            found.append((freed, f"{verb} trainer.{key} from {now} to {value}, which frees {gib(freed)},"))
            if freed >= need:
                break
    enough = [text for freed, text in found if freed >= need]
    return enough[:3] or [max(found)[1]]


def _ladder(config: RunConfig) -> list[tuple[str, list[Any]]]:
    """Keys of the trainer that change no bit, in the order of what they cost in speed, and the values after the present.
    Smaller micro-batches save less of the forward pass; larger ones are fewer, so that fewer gradients wait."""
    section = config.trainer
    key = "micro_leaves" if section.micro_tokens is None else "micro_tokens"
    micro = getattr(section, key)
    modes, places = ["none", "selective", "layer"], ["none", "optimizer", "all"]
    return [
        (key, [micro >> i for i in range(1, micro.bit_length())]),
        (key, [micro << i for i in range(1, 5)]),
        ("checkpointing", modes[modes.index(section.checkpointing) + 1 :]),
        ("world_size", [2 * section.world_size]),
        ("offload", places[places.index(section.offload) + 1 :] if config.device == "cuda" else []),
    ]


def _rollout(config: RunConfig, plan: Plan, need: int) -> list[str]:
    section = config.rollout
    page = max(plan.kv_bytes // section.pages, 1)
    pages = max(section.pages - -(-need // page), section.pages // 8, 1)
    tokens = max(section.max_batch_tokens // 2, 1)
    return [
        _lower("rollout.pages", section.pages, pages, (section.pages - pages) * page),
        f"rollout.max_batch_tokens from {section.max_batch_tokens} to {tokens}",
    ]


def _lower(key: str, now: int, then: int, freed: int) -> str:
    return f"lower {key} from {now} to {then}, which frees {gib(freed)},"
