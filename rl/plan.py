"""Predicts a run's processes, memory and batch sizes without starting it."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kernels.host.place import HOST, Place
from kernels.model import ModelConfig, costs
from kernels.model.formats import PLAIN
from kernels.tree import is_power_of_two
from rl.adapters import adapted_model, given, shown
from rl.config import RunConfig, TrainerSection
from rl.data import Source
from rl.errors import UserError
from rl.frozen import FrozenModel, frozen_model, preference_model
from rl.hosted.asked import needs_cards
from rl.model import critic_model
from rl.placement import Node, Placement, Share, beside, choose, place, shares
from rl.requests import check_sampling
from rollout.capacity import ENGINE_PROCESS, serving_bytes
from trainer.batch import BatchError, check_batch_arithmetic, cut_by_tokens
from trainer.checkpoint import folders
from trainer.memory import TrainerMemory, fuller, together, trainer_memory

_PROCESS = 450 * 2**20  # a Python process with torch and Ray, measured on Linux with the CPU build
_CONTEXT = 600 * 2**20  # of a process on a GPU, beside its tensors
CARDS = {16: 15.5, 24: 22.0, 32: 31.0, 40: 39.0, 48: 44.0, 80: 79.0, 96: 94.0, 141: 139.0, 180: 177.0}
"""GB of memory that cards are sold with: GiB that a run can have of the smallest of them (an L4 of 24 GB has 22.0)."""
_SHOWN_IDS, _SHOWN_LETTERS = 64, 400  # of a prompt
_MOST_SEQUENCES = 2**26  # of one step
_STALL = 0.99  # a bfloat16 has 8 bits: x * 0.996 rounds to x


@dataclass(frozen=True)
class Plan:
    """Holds what a run will take: processes, bytes of each, and the tokens that fit."""

    model: ModelConfig
    on_cpu: bool
    colocated: bool
    prompt_tokens: int  # of the longest prompt
    parameters: int
    adapter_parameters: int  # of adapters; 0 where the weights themselves are trained
    rollout_processes: int
    trainer_processes: int
    weights_bytes: int  # of one rollout process
    kv_bytes: int  # of one rollout process
    serving_bytes: int  # of one rollout process: activations of the largest engine step, logits of all that it samples
    kv_tokens: int  # that the pages of one engine hold
    trainer: TrainerMemory  # of one trainer process, with sequences of full length
    checkpoint_bytes: int  # of one, all ranks together; 0 where none are written
    snapshot_bytes: int  # host memory of one trainer process while it writes one
    disk_bytes: int  # the checkpoints that are kept, one that is being written, the trained model, and a kept reference
    frozen_bytes: int  # of a rollout process in host memory: weights under adapters, if A and B may be published alone
    sequences: int
    micro_batches: int  # of each trainer process in one update, with sequences of full length
    warmup_micro_batches: int

    @property
    def rollout_bytes(self) -> int:
        """Counts the bytes of one rollout process: tensors on its GPU, or on a CPU all that it has."""
        own = ENGINE_PROCESS + self.frozen_bytes if self.on_cpu else 0
        return self.weights_bytes + self.kv_bytes + self.serving_bytes + own

    @property
    def trainer_host_bytes(self) -> int:
        """Counts the bytes of one trainer process in host memory, where it has a GPU: what lives there, and what waits there
        while the rollout has the card."""
        return 0 if self.on_cpu else self.trainer.host + self.trainer.state * self.colocated

    @property
    def trainer_bytes(self) -> int:
        """Counts the bytes of one trainer process: tensors on its GPU, or on a CPU all that it has."""
        return self.trainer.peak + (_PROCESS if self.on_cpu else 0)


def make_plan(config: RunConfig, model: ModelConfig, prompt_tokens: int) -> Plan:
    """Predicts what a run takes; BatchError or UserError where the numbers do not fit. `prompt_tokens`: of the longest
    prompt."""
    section, rollout = config.trainer, config.rollout
    check_sampling(rollout, config.eval)
    config.algorithm.check(rollout.max_new_tokens)
    sequences = config.algorithm.prompts_per_step * config.algorithm.group_size
    _check_sequences(config)
    response = config.response_tokens
    length = prompt_tokens + response
    micro_batches, tokens = _of_update(config, sequences, length)
    warmup = _micro_batches(section, config.warmup.sequences, length)[0] if config.warmup.steps else 0
    _check_moments(section)
    _check_replicas(section)
    kv_tokens = rollout.pages * rollout.page_size
    frozen = frozen_model(config, model)
    paired = preference_model(config, model)
    _check_length(config, prompt_tokens, model, frozen)
    width = torch.finfo(config.dtype).bits // 8
    limits = rollout.limits
    adapted = adapted_model(config, model)
    critic = [critic_model(model)] if config.algorithm.critic else []
    memory = partial(_memory, config, tokens=tokens, rows=tokens * response // length, micro_batches=micro_batches)
    trainer = memory(adapted, model, [one.model for one in (frozen, paired) if one], critic)
    saved = _saved_models(config, frozen)
    kept = [model if config.warmup.steps else adapted, *critic]
    checkpoint = sum(map(costs.checkpoint_bytes, kept)) if config.checkpoint.every else 0
    return Plan(
        model=model,
        on_cpu=config.device == "cpu",
        colocated=config.cluster.placement == "colocated",
        prompt_tokens=prompt_tokens,
        parameters=costs.parameter_count(model),
        adapter_parameters=costs.adapter_count(adapted),
        rollout_processes=rollout.tp * rollout.replicas,
        trainer_processes=section.world_size,
        weights_bytes=costs.weight_bytes(model, rollout.tp, width),
        kv_bytes=kv_tokens * costs.token_bytes(model, rollout.tp, width),
        serving_bytes=serving_bytes(model, limits, rollout.tp, width),
        kv_tokens=kv_tokens,
        trainer=trainer,
        checkpoint_bytes=checkpoint,
        snapshot_bytes=checkpoint * section.replicas // section.world_size,
        disk_bytes=checkpoint * (config.checkpoint.keep + 1) + costs.file_bytes(model) * saved,
        frozen_bytes=_frozen_bytes(config, model, width),
        sequences=sequences,
        micro_batches=micro_batches,
        warmup_micro_batches=warmup,
    )


def _memory(
    config: RunConfig,
    adapted: ModelConfig,
    model: ModelConfig,
    frozen: Sequence[ModelConfig],
    critics: Sequence[ModelConfig],
    *,
    tokens: int,
    rows: int,
    micro_batches: int,
) -> TrainerMemory:
    """Predicts the bytes of a trainer rank. `adapted`: the policy with its adapters; `frozen`: what is asked beside it."""
    section = config.trainer
    memory = partial(
        trainer_memory,
        dtype=config.dtype,
        device=config.device,
        world_size=section.world_size // section.replicas,
        replicas=section.replicas,
        checkpointing=section.checkpointing,
        offload=section.offload,
        moments=getattr(torch, section.moments),
        tokens=tokens,
        rows=rows,
        micro_batches=micro_batches,
    )
    past = [model] if config.algorithm.lag and config.cluster.placement == "split" else []  # that drew what is compared
    trainer = memory(adapted, frozen=frozen, past=past)
    if adapted.adapter and config.warmup.steps:  # which trains the whole model
        trainer = fuller(trainer, memory(model, frozen=frozen, past=past))
    for one in critics:
        trainer = together(trainer, memory(one))
    return trainer


def _frozen_bytes(config: RunConfig, model: ModelConfig, width: int) -> int:
    """Counts what a rollout process keeps in host memory: weights under adapters, if A and B may be published alone."""
    section = config.adapter
    over_hosts = section.publish == "auto" and config.cluster.address != "local"
    if not section.ranks or not (over_hosts or section.publish == "factors"):
        return 0
    return costs.held_bytes(replace(model, format=PLAIN), config.rollout.tp, width)


def _saved_models(config: RunConfig, frozen: FrozenModel | None) -> int:
    """Counts the models that stay in out_dir in float32: the trained one, a kept reference, or what is under adapters."""
    adapters = bool(config.adapter.ranks)
    return (config.save_model if not adapters else given(config) is None) + (
        frozen is not None and frozen.source is None
    )


def _check_replicas(section: TrainerSection) -> None:
    if not is_power_of_two(section.replicas) or section.world_size % section.replicas:
        raise UserError(
            f"trainer.replicas={section.replicas} with trainer.world_size={section.world_size}: each replica is a subtree of "
            f"the gradient's tree; set 1 or a power of two up to trainer.world_size"
        )


def _check_moments(section: TrainerSection) -> None:
    if section.moments == "bfloat16" and section.betas[1] > _STALL:
        raise UserError(
            f"trainer.moments=bfloat16 with trainer.betas[1]={section.betas[1]}: above {_STALL} a rounded second moment no "
            f"longer decays; lower it or set trainer.moments=float32"
        )


def _check_length(config: RunConfig, prompt_tokens: int, model: ModelConfig, frozen: FrozenModel | None) -> None:
    """Raises UserError where a sequence of full length has no room."""
    rollout, length = config.rollout, prompt_tokens + config.response_tokens
    key = "rollout.max_new_tokens" if config.environment.name == "single_turn" else "environment.max_tokens"
    asked, kv_tokens = f"{prompt_tokens} prompt + {key}={config.response_tokens}", rollout.pages * rollout.page_size
    if length > min(model.max_positions, kv_tokens):
        raise UserError(
            f"{asked} tokens exceed the model's {model.max_positions} positions or the {kv_tokens} tokens of "
            f"rollout.pages={rollout.pages} x page_size={rollout.page_size}"
        )
    if frozen and length > frozen.model.max_positions:
        raise UserError(
            f"{asked} tokens exceed the {frozen.model.max_positions} positions of {frozen.key}={frozen.source}"
        )


def _check_sequences(config: RunConfig) -> None:
    section, warmup = config.algorithm, config.warmup.sequences
    made = f"algorithm.prompts_per_step={section.prompts_per_step} x algorithm.group_size={section.group_size}"
    for what, count in ((made, section.prompts_per_step * section.group_size), (f"warmup.sequences={warmup}", warmup)):
        if count > _MOST_SEQUENCES:
            raise UserError(f"{what}: {count:,} sequences in one step are above {_MOST_SEQUENCES:,}")


def _of_update(config: RunConfig, sequences: int, length: int) -> tuple[int, int]:
    """As `_micro_batches`, of one update of a step of `sequences`."""
    cut = config.algorithm.mini_batches
    try:
        return _micro_batches(config.trainer, sequences // cut, length)
    except BatchError as error:
        if cut == 1:
            raise
        raise BatchError(f"algorithm.mini_batches={cut} cut {sequences} sequences: {error}") from None


def _micro_batches(section: TrainerSection, sequences: int, length: int) -> tuple[int, int]:
    """(micro-batches of a step whose sequences all have `length` tokens; tokens of the fullest one, on one rank)."""
    if section.micro_tokens is None:
        sizes = (section.leaf_sequences, section.micro_leaves, section.world_size)
        return check_batch_arithmetic(sequences, *sizes), section.leaf_sequences * section.micro_leaves * length
    check_batch_arithmetic(sequences, section.leaf_sequences, 1, section.world_size)
    if section.leaf_sequences * length > section.micro_tokens:
        raise BatchError(
            f"trainer.micro_tokens={section.micro_tokens} is below one leaf: trainer.leaf_sequences="
            f"{section.leaf_sequences} sequences of up to {length} tokens are {section.leaf_sequences * length}"
        )
    parts = cut_by_tokens(np.full(sequences, length), section.leaf_sequences, section.world_size, section.micro_tokens)
    return len(parts), min(sequences // section.world_size * length, section.micro_tokens)


def check_machine(config: RunConfig, plan: Plan, nodes: Sequence[Node]) -> None:
    """Raises UserError where there is no such device, or too little disk or memory. `nodes`: that ranks can run on."""
    _check_disk(config, plan)
    chosen = choose(config, nodes)
    given = shares(config, chosen)
    placement = place(config, chosen, given)
    if asked := needs_cards(config):
        beside(config, nodes, asked)
    for node, share in zip(chosen, given, strict=True):
        _check_cards(config, plan, placement, node)
        short = _host_shortage(config, plan, node, share)
        if short and config.device == "cpu":
            raise UserError(short)
        if short:
            print(f"samebit: warning: {short}", file=sys.stderr, flush=True)


def _host_shortage(config: RunConfig, plan: Plan, node: Node, share: Share) -> str:
    """Says what to change; "" where there is enough. For a run on GPUs it is a warning: their virtual machines may be given
    memory as they use it, and show less at first than they can have."""
    trainer = plan.trainer_bytes if plan.on_cpu else _PROCESS + plan.trainer_host_bytes
    rollout = (plan.rollout_bytes if plan.on_cpu else plan.frozen_bytes) * share.engines * config.rollout.tp
    need = share.trainer * (trainer + plan.snapshot_bytes) + rollout
    if not node.memory or need <= node.memory:
        return ""
    there = "" if node.host == HOST else f" on node {node.host}"
    return (
        f"the plan needs about {gib(need)} of host memory{there} and {gib(node.memory)} is free: lower rollout.pages, "
        f"trainer.micro_leaves, rollout.replicas or the model's size, or change trainer.offload"
    )


def card_bytes(config: RunConfig, plan: Plan, where: Placement, card: Place) -> int:
    """Counts the bytes that the plan puts on a card: colocated ranks hand it over, and keep what a process has anyway."""
    trainer, rollout = (sum(p == card for p in ranks) for ranks in (where.trainer, where.rollout))
    parts = [trainer * plan.trainer_bytes, rollout * plan.rollout_bytes]
    return (max(parts) if config.cluster.placement == "colocated" else sum(parts)) + (trainer + rollout) * _CONTEXT


def _cards_that_do(config: RunConfig, plan: Plan) -> list[tuple[str, str]]:
    """Says what the fullest card needs where each rank of a kind has its own, and the smallest size that has it."""
    if config.device == "cpu":
        return []
    kinds = [plan.trainer_bytes, plan.rollout_bytes]
    colocated = config.cluster.placement == "colocated"
    need = max(kinds) + _CONTEXT * (1 + colocated)
    size = next((f"cards of {gb} GB and more" for gb, room in CARDS.items() if need <= room * 2**30), "no known card")
    shared = ", which a trainer and a rollout process share in turn" if colocated else ", of one process"
    return [("memory, card", f"{gib(need)} on the fullest{shared}: {size}")]


def _check_cards(config: RunConfig, plan: Plan, where: Placement, node: Node) -> None:
    """Raises UserError where a card is too small for what the plan puts on it."""
    for card, size in zip(node.cards, node.card_bytes, strict=False):
        here = Place(node.host, card)
        trainer, rollout = (sum(p == here for p in ranks) for ranks in (where.trainer, where.rollout))
        if (need := card_bytes(config, plan, where, here)) > size:
            name = f"card {card}" if node.host == HOST else here
            raise UserError(
                f"{name} has {gib(size)} and {trainer} trainer rank(s) of {gib(plan.trainer_bytes)} and {rollout} rollout "
                f"process(es) of {gib(plan.rollout_bytes)} need {gib(need)} there ({config.cluster.placement}): set "
                f"trainer.checkpointing, trainer.offload or trainer.micro_tokens, lower rollout.pages, or raise "
                f"trainer.world_size or rollout.tp"
            )


def _check_disk(config: RunConfig, plan: Plan) -> None:
    out_dir = Path(config.out_dir).absolute()
    try:
        nearest = next(p for p in (out_dir, *out_dir.parents) if p.exists())
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        raise UserError(f"out_dir={config.out_dir} cannot be read: {error.strerror}") from None
    there = min(len(folders(out_dir / "checkpoints")), config.checkpoint.keep)
    need = plan.disk_bytes - plan.checkpoint_bytes * there
    if need > free:
        raise UserError(
            f"the plan needs about {gib(need)} of disk and {gib(free)} is free at {nearest}: lower checkpoint.keep, set "
            f"checkpoint.every=0, or choose another out_dir"
        )


def _nodes(config: RunConfig, nodes: Sequence[Node]) -> list[tuple[str, str]]:
    """Says what each node of a cluster gets, or what is missing."""
    if not nodes or config.cluster.address == "local":
        return []
    try:
        chosen = choose(config, nodes)
        given = zip(chosen, shares(config, chosen), strict=True)
    except UserError as error:
        return [("nodes", f"missing: {error}")]
    said = (f"{node.host}: {share.trainer} trainer rank(s), {share.engines} engine(s)" for node, share in given)
    return [("nodes", "; ".join(said))]


def _placement(config: RunConfig, plan: Plan) -> str:
    processes = plan.rollout_processes + plan.trainer_processes
    if config.cluster.placement == "split":
        return f"split: {processes} cards, one a process" if config.device == "cuda" else "split"
    return (
        "colocated: the engines sleep, without weights and pages, while the trainer steps; its state waits on the host"
    )


def _trained(config: RunConfig, plan: Plan) -> str:
    ranks = config.adapter.ranks
    return f"; trained: {plan.adapter_parameters:,} of adapters, rank of {shown(ranks)}" if ranks else ""


def print_plan(
    config: RunConfig,
    model: ModelConfig,
    plan: Plan,
    console: Console,
    source: Source | None = None,
    nodes: Sequence[Node] = (),
) -> None:
    """Prints the plan as a table. `source`: of the problems, where they were read. `nodes`: of a cluster."""
    section = config.trainer
    tree = f"exact, {model.leaves} leaves of every contraction; gradient leaves of {section.leaf_sequences} sequences"
    saved = 4 * plan.parameters if config.save_model else 0
    table = Table(title="Plan (nothing was started or written)", show_header=False, title_justify="left")
    rows = [
        (
            "model",
            f"{plan.parameters:,} parameters, {model.layers} layers x {model.hidden_size}, vocabulary {model.vocab_size:,}"
            + _trained(config, plan),
        ),
        (
            "numerics",
            tree if config.numerics == "exact" else f"{config.numerics}: the vendor's ops; nothing is promised",
        ),
        (
            "processes",
            f"{config.rollout.replicas} rollout engine(s) x tp {config.rollout.tp} + {section.world_size} trainer ranks "
            f"on {config.device}",
        ),
        ("placement", _placement(config, plan)),
        *_nodes(config, nodes),
        (
            "memory, rollout process",
            f"{gib(plan.rollout_bytes)} at the peak: weights {gib(plan.weights_bytes)}, keys and values {gib(plan.kv_bytes)}, "
            f"activations {gib(plan.serving_bytes)}",
        ),
        (
            "memory, trainer process",
            f"{gib(plan.trainer_bytes)} at the peak: weights and moments {gib(plan.trainer.state)}, gradients "
            f"{gib(plan.trainer.gradients)}, saved activations {gib(plan.trainer.activations)}"
            + (f"; {gib(plan.trainer_host_bytes)} of host memory" if plan.trainer_host_bytes else ""),
        ),
        *_cards_that_do(config, plan),
        (
            "KV capacity of an engine",
            f"{plan.kv_tokens:,} tokens ({config.rollout.pages:,} pages of {config.rollout.page_size})",
        ),
        ("batch", _batch(config, plan)),
        (
            "disk",
            f"{gib(plan.disk_bytes)} = {config.checkpoint.keep} + 1 checkpoints of {gib(plan.checkpoint_bytes)} + the model "
            f"{gib(saved)}; while one is written, {gib(plan.snapshot_bytes)} of host memory a trainer process"
            if plan.checkpoint_bytes
            else f"{gib(saved)}: the model, and no checkpoint (checkpoint.every=0)",
        ),
        ("steps", f"{config.warmup.steps} supervised + {config.steps} GRPO"),
        *_first_prompt(source),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _batch(config: RunConfig, plan: Plan) -> str:
    algorithm, section = config.algorithm, config.trainer
    asked = f"{algorithm.prompts_per_step} prompts x group of {algorithm.group_size} = {plan.sequences} sequences"
    if algorithm.mini_batches > 1:
        asked += f" = {algorithm.mini_batches} updates of {plan.sequences // algorithm.mini_batches}, each"
    if section.micro_tokens is None:
        return (
            f"{asked} = leaf_sequences {section.leaf_sequences} x micro_leaves {section.micro_leaves} x world_size "
            f"{section.world_size} x {plan.micro_batches} micro-batches"
        )
    return f"{asked} = {plan.micro_batches} micro-batches of at most {section.micro_tokens:,} tokens a rank, or fewer"


def _first_prompt(source: Source | None) -> list[tuple[str, str]]:
    """Shows how much data there is, what the model reads, as text and as ids, and what ends its answers."""
    if source is None:
        return [("first prompt", "the data was not read: model.hf.vocab_size says all that a plan needs")]
    ids, tokenizer = source.train[0].prompt_ids, source.tokenizer
    text, some = tokenizer.decode(ids, special=True), " ".join(map(str, ids[:_SHOWN_IDS]))
    text = text if len(text) <= _SHOWN_LETTERS else text[:_SHOWN_LETTERS] + "..."
    more = f" ... ({len(ids)} ids)" if len(ids) > _SHOWN_IDS else ""
    counts = f"{len(source.train):,} problems to train on, {len(source.held_out):,} held out"
    shown = {
        "data": "; ".join((counts, *source.about)),
        "first prompt": f"{text!r}: ids {some}{more}",
        "an answer ends with": tokenizer.shown(tokenizer.ends),
    }
    return [(what, escape(value)) for what, value in shown.items()]


def gib(n: int) -> str:
    """Formats bytes as GiB, or below one as MiB."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
