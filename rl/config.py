"""Declares every key of a run with its type, range and meaning. `configs/*.yaml` holds the values."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import torch
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from kernels.model.parameter import Target
from rl.algorithms import AnyAlgorithmSection
from rl.data.section import DATA, AnyData, DatasetSection, Name, ReasoningGymSection
from rl.environments.section import EnvironmentSection
from rl.errors import UserError
from rl.keys import REFUSED, nearest
from rl.rewards.section import OwnRewards, Rewards, ScoringSection
from rl.run.trackers import TRACKERS
from rl.section import Decay, Folder, Fraction, Natural, Positive, Seconds, Section, Steps, Text, found_at_home
from rollout.engine import EngineConfig
from rollout.keys import (
    Dtype,
    Format,
    Leaves,
    MaxBatchTokens,
    MaxRunning,
    Pages,
    PageSize,
    PrefillChunk,
    PrefixCache,
    Speculate,
    Threads,
    Tp,
)
from rollout.scheduler import Limits


class ModelSection(Section):
    """Says which model is trained, and in which arithmetic."""

    path: Folder | None = Field(description="Hugging Face model directory; null: random weights of the shape `hf`")
    hf: dict[str, Any] = Field(description="fields of a Hugging Face config; vocab_size null: that of the tokenizer")
    leaves: Leaves | None = Field(description="null: as the contract of the model in `path` says, or 8")
    dtype: Dtype = Field(
        description="of activations and of the rollout's weights; auto: as that contract says, or float32 on a CPU and "
        "bfloat16 on a GPU or in a quantized format"
    )
    format: Format = Field(description="auto: as the model's files or contract say, or plain")


class RolloutSection(Section):
    """Says how many engines sample, how, and with how much memory. The engine's keys, with their ranges and meanings, are those
    of rollout/keys.py."""

    tp: Tp
    replicas: Positive = Field(description="engines that share a step's requests")
    temperature: float = Field(gt=0, description="of sampling, and of the log-probs that are trained on")
    top_k: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        description="draw from the k most likely tokens; 0: no limit. The trainer's log-probs are cut alike, as by the next two"
    )
    top_p: float = Field(gt=0, le=1, description="draw from the likeliest tokens that together have this probability")
    min_p: Fraction = Field(description="draw from tokens of at least this times the probability of the likeliest")
    max_new_tokens: Positive = Field(description="tokens of a completion at most, also in an evaluation")
    carry: Natural = Field(
        description="tokens that a sample draws in a round before it waits: a step takes rounds, each with prompts_per_step "
        "further problems, until as many groups are done, and carries the rest to the next, whose weights go on with them; 0: "
        "a step draws its samples whole"
    )
    pages: Pages
    page_size: PageSize
    prefix_cache: PrefixCache
    max_running: MaxRunning
    max_batch_tokens: MaxBatchTokens
    prefill_chunk: PrefillChunk
    speculate: Speculate
    threads: Threads

    @property
    def limits(self) -> Limits:
        """Returns the limits of an engine's batches."""
        return Limits(self.max_running, self.max_batch_tokens, self.prefill_chunk)

    def engine(self, dtype: torch.dtype, device: str, family: str = "auto") -> EngineConfig:
        """Makes the config of each rank's engine, which runs the kernels of a family of cards."""
        sizes, on_gpu = (self.pages, self.page_size, self.prefix_cache, self.limits), device == "cuda"
        fast = on_gpu, on_gpu
        return EngineConfig(*sizes, dtype, device, *fast, family, self.speculate)


class TrainerSection(Section):
    """Says how many ranks train, in which pieces, and with what kept."""

    world_size: Positive = Field(description="FSDP2 processes")
    replicas: Positive = Field(
        description="times that these processes hold the model: as many as there are nodes keeps its rows inside a node, and "
        "gradients alone cross the network; 1: every process has other rows"
    )
    leaf_sequences: Positive = Field(description="sequences of one leaf of the gradient's tree")
    micro_leaves: Positive = Field(description="leaves of one micro-batch, where micro_tokens is null")
    micro_tokens: Positive | None = Field(
        description="most tokens of one micro-batch on one rank: as many leaves as fit; null: micro_leaves says"
    )
    checkpointing: Literal["none", "selective", "layer"] = Field(
        description="what a layer computes again in the backward pass: nothing, norms, rope and gated products, or all of it"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        description="what lives in host memory: none, AdamW's moments, or these, the master weights and waiting gradients"
    )
    moments: Literal["float32", "bfloat16"] = Field(
        description="what AdamW's moments are kept in; bfloat16, rounded to nearest, is another run with half their memory"
    )
    lr: float = Field(gt=0, description="of GRPO's steps, at its highest")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        description="what becomes of lr after the warm-up: it stays, or falls and is 0 after the last step; a resumed run then "
        "has the same `steps`"
    )
    lr_warmup_steps: Steps = Field(description="steps in which lr rises linearly; 0: none")
    betas: tuple[Decay, Decay] = Field(description="of AdamW: decay of the first moment and of the second")
    eps: float = Field(gt=0, description="of AdamW, beside the root of the second moment")
    weight_decay: float = Field(ge=0, description="of AdamW, decoupled: times lr, of matrices alone")
    grad_clip: float = Field(gt=0, description="a gradient whose 2-norm is larger is scaled down to it")
    router_aux_loss_coef: float = Field(
        ge=0, description="of a mixture of experts: coefficient of the load-balancing loss; 0: none"
    )
    threads: Threads


ONE, EACH, UNSAID = "one", "each", "unsaid"  # of a value that may be a number or a number for each of several


class AdapterSection(Section):
    """Says whether low-rank adapters of frozen weights are trained in the place of the weights."""

    path: str | None = Field(
        description="a folder of LoRA adapters (peft) of model.path, which are trained further; null: new ones"
    )
    rank: Annotated[
        Annotated[int, Field(ge=0, lt=2**20), Tag(ONE)]
        | Annotated[dict[Target, Annotated[int, Field(gt=0, lt=2**20)]], Tag(EACH)]
        | Annotated[None, Tag(UNSAID)],
        Discriminator(lambda value: UNSAID if value is None else EACH if isinstance(value, dict) else ONE),
    ] = Field(
        description="of B A, which is added to a weight that is frozen; 0: none, the weights themselves are trained. Or one a "
        "target: {attention: 16, mlp: 32}. null, here and below: as adapter.path has it, else 0"
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        description="the addition is alpha / rank times B A; null: else 32"
    )
    targets: tuple[Target, ...] | None = Field(
        description="which matrices have one: attention (q, k, v, o), mlp (gate, up, down), experts (the same of each), head; "
        "null: else attention and mlp"
    )
    publish: Literal["auto", "weights", "factors"] = Field(
        description="what goes to the engines after a step: the merged weights; A and B, which they merge themselves into the "
        "frozen weights, which each keeps in host memory; auto: these where they are less and an engine is elsewhere"
    )
    rslora: bool | None = Field(description="alpha / sqrt(rank) instead; null: else false")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Refuses ranks that are not those of the targets."""
        if self.targets is not None and not 0 < len(set(self.targets)) == len(self.targets):
            raise PydanticCustomError(
                "targets", "targets must name each of attention, mlp, experts, head at most once, and one at least"
            )
        if isinstance(self.rank, dict) and self.targets is not None and set(self.rank) != set(self.targets):
            raise PydanticCustomError(
                "ranks", "rank names {there}, targets {asked}", {"there": list(self.rank), "asked": list(self.targets)}
            )
        return self

    @property
    def ranks(self) -> tuple[tuple[Target, int], ...]:
        """Returns the rank of every target; none where the weights are trained."""
        one = self.rank
        return tuple((t, one if isinstance(one, int) else one[t]) for t in self.targets or () if one)


class WarmupSection(Section):
    """Says how the policy is taught before GRPO."""

    steps: Steps = Field(description="supervised steps before GRPO; 0: none")
    sequences: Positive = Field(description="sequences of one supervised step; kind=dpo: two of each pair")
    lr: float = Field(gt=0, description="peak; falls linearly to 0")
    wrong_frac: Fraction = Field(description="kind=sft: share of demonstrations that carry another problem's solution")
    kind: Literal["sft", "dpo"] = Field(
        description="sft: the likelihood of the data's solutions; dpo: pairs of a chosen and a rejected answer, against the "
        "initial weights"
    )
    beta: float = Field(gt=0, description="kind=dpo: how strongly the policy is held near the initial weights")
    chosen: Text = Field(description="kind=dpo: field of the answer that was chosen, a text or messages; data=dataset")
    rejected: Text = Field(description="kind=dpo: and of the one that was rejected")


class AlignSection(Section):
    """Says what happens where sampler and trainer disagree."""

    policy: Literal["fail", "warn"] = Field(description="what one differing bit does")
    every: Positive = Field(
        description="of algorithm.lag or rollout.carry above 0: steps between those whose samples are compared, by a further "
        "forward pass with the weights that drew them; else every step is compared, for nothing"
    )
    keep_batches: tuple[Positive, ...] = Field(
        description="steps whose batch stays in out_dir/batches, with the weights that sampled it: `python -m rl.replay` "
        "computes it again. That of the first step in which a bit differs stays in any case, without weights"
    )


class CheckpointSection(Section):
    """Says when checkpoints are written and how many stay."""

    every: Steps = Field(
        description="steps between checkpoints, supervised or GRPO; also after the last of each. 0: none"
    )
    keep: Positive = Field(description="checkpoints that stay, the newest ones")


class ClusterSection(Section):
    """Says where processes run and how long they may take to start."""

    placement: Literal["colocated", "split"] = Field(
        description="colocated: rollout and trainer ranks share the cards and hand their memory to each other; split: a card "
        "each"
    )
    address: str = Field(
        description="'local' starts Ray on this machine; otherwise a running Ray cluster: auto, or HOST:PORT"
    )
    nodes: Annotated[int, Field(gt=0, le=4096)] | None = Field(
        description="nodes of the cluster to use; null: the fewest that have a card (on a CPU: a core) for every rank"
    )
    interface: Text | None = Field(
        description="network interface over which the nodes of a cluster talk (eth0, ib0); null: that of Ray's addresses"
    )
    port: Annotated[int, Field(ge=0, le=65000)] = Field(description="first port of the rendezvous; 0: any free ones")
    timeout: Seconds = Field(description="seconds to wait for Ray and for all processes to start")
    patience: Seconds = Field(
        description="seconds for which a rank may give no sign of life (a signal or a debugger stopped it) before the run "
        "ends; the others wait twice as long for it in a collective, and `timeout` at least"
    )

    @property
    def collective_seconds(self) -> int:
        """Returns the seconds that a rank waits in a collective: longer than the driver takes to name who did not come,
        and no less than they may take to start."""
        return max(2 * self.patience, self.timeout)


class TaskSet(ReasoningGymSection):
    """Says which problems of a reasoning-gym dataset are evaluated beside the held-out ones, and how."""

    samples: Positive | None = Field(default=None, description="completions of each problem; null: eval.samples")
    reward: OwnRewards = Field(default=None, description="what judges the set; null: the run's reward")


class FileSet(DatasetSection):
    """Says which problems of a data set are evaluated beside the held-out ones, and how."""

    samples: Positive | None = Field(default=None, description="completions of each problem; null: eval.samples")
    reward: OwnRewards = Field(default=None, description="what judges the set; null: the run's reward")


SETS: dict[str, type[Section]] = {"reasoning_gym": TaskSet, "dataset": FileSet}
"""The sections of a set of `eval.sets`, by kind."""


class EvalSection(Section):
    """Says when the policy is evaluated, and on how much."""

    problems: Positive = Field(description="held-out problems")
    samples: Positive = Field(description="completions of each problem; above 1: pass@k and maj@k beside the accuracy")
    every: Steps = Field(description="GRPO steps between evaluations; 0: only before and after")
    temperature: float = Field(ge=0, description="of an evaluation's samples; 0: the most likely token")
    keep_samples: bool = Field(description="every sample of every evaluation in out_dir/evaluations, a file each")
    sets: dict[Name, Annotated[TaskSet | FileSet, Field(discriminator="kind")]] = Field(
        description="further sets, by names of yours: what `data` would say of each (as data.sources has it), `samples` and "
        "`reward`; all of a file is evaluated, of what has splits that which is held out"
    )


def _resume(value: object) -> object:
    if value is True or value == "":
        raise PydanticCustomError("resume", "must be auto, false or the folder of a checkpoint")
    return "false" if value is False else value


def _trackers(value: object) -> object:
    """One name, or a list of names; none is no tracker."""
    names = [value] if isinstance(value, str) else value
    if names == ["none"] or names == []:
        return ()
    known = (*TRACKERS, "none")
    if (
        not isinstance(names, list | tuple)
        or any(name not in TRACKERS for name in names)
        or len(set(names)) < len(names)
    ):
        raise PydanticCustomError("trackers", "must be {known}, or a list of several", {"known": ", ".join(known)})
    return names


Trackers = Annotated[tuple[str, ...], BeforeValidator(_trackers)]


class KernelsSection(Section):
    """Says which kernels a GPU runs."""

    family: Literal["auto", "portable"] = Field(
        description="device=cuda: auto: the card's own; portable: plain Triton, which every card since 8.0 runs. Families may "
        "differ in bits of a gradient: a run stays with one"
    )


class RunConfig(Section):
    """Holds all keys of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        description="of random weights, of the problems drawn, their order, and every sample"
    )
    steps: Steps = Field(description="GRPO steps")
    out_dir: Folder = Field(description="the run's folder, which one process writes to at a time")
    resume: Annotated[str, BeforeValidator(_resume), AfterValidator(found_at_home)] = Field(
        description="auto: go on with what out_dir holds of this run; false: refuse a used out_dir; or a checkpoint's folder"
    )
    mode: Literal["full", "rollout_only", "train_only"] = Field(
        description="full: a run; rollout_only: samples and scores by the first weights, and keeps every step's batch; "
        "train_only: trains on the batches that a run kept"
    )
    batches: Folder | None = Field(description="of mode=train_only: the run whose out_dir/batches are trained on")
    save_model: bool = Field(description="the trained weights as a Hugging Face model in out_dir/model")
    dry_run: bool = Field(description="says what a run would be and take, and starts nothing")
    device: Literal["cpu", "cuda"] = Field(description="where both sides compute")
    kernels: KernelsSection
    numerics: Literal["exact", "fast"] = Field(
        description="fast: torch's matmul, and in the trainer its attention and log-prob. A contrast: nothing is promised of it"
    )
    logger: Trackers = Field(
        description="where the run is shown beside its files: wandb, tensorboard, trackio, several as a list, or none"
    )
    reward: Rewards = Field(
        description="module:function, path/to/file.py:function or a built-in one of rl/rewards; null: the data's own "
        "verifier; or a list of {function, weight, args, name}, whose weighted sum is the reward"
    )
    scoring: ScoringSection
    environment: EnvironmentSection
    model: ModelSection
    data: Annotated[AnyData, Field(discriminator="kind")]
    rollout: RolloutSection
    trainer: TrainerSection
    adapter: AdapterSection
    algorithm: AnyAlgorithmSection
    warmup: WarmupSection
    eval: EvalSection
    align: AlignSection
    checkpoint: CheckpointSection
    cluster: ClusterSection

    @property
    def response_tokens(self) -> int:
        """Returns the most tokens of a sequence beside its problem's prompt."""
        one = self.environment.name == "single_turn"
        return self.rollout.max_new_tokens if one else self.environment.max_tokens

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of activations: as asked, else float32 on a CPU and bfloat16 on a GPU or in a quantized format."""
        if self.model.dtype == "auto":
            plain = self.model.format in ("auto", "plain")
            return torch.float32 if plain and self.device != "cuda" else torch.bfloat16
        return torch.float32 if self.model.dtype == "float32" else torch.bfloat16


def validate(values: dict[str, Any]) -> RunConfig:
    """Returns the typed config, or raises UserError with the first offending key, its value and what is allowed."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = _place(first["loc"], values)
        key = ".".join(path)
        if first["type"] == "extra_forbidden":
            known = sorted(_known_keys(path[:-1], values))
            raise UserError(unknown_key(key, known)) from None
        if first["type"].startswith("union_tag"):  # of a section that is one of several
            told = first["ctx"]
            key = f"{key}.{told['discriminator'].strip(chr(39))}"
            if "tag" not in told:
                raise UserError(f"{key} is missing: set {key}=...") from None
            raise UserError(f"{key}={told['tag']!r}: must be one of {told['expected_tags']}") from None
        if first["type"] == "missing":
            raise UserError(f"{key} is missing: set {key}=...") from None
        said = "is a group of keys" if first["type"] == "model_type" else first["msg"].lower()
        raise UserError(f"{key}={first['input']!r}: {said}") from None


def _place(loc: Sequence[int | str], values: Any) -> list[str]:
    """Returns the parts of the key at `loc`, where pydantic also says a kind of data or an algorithm, and that a name is
    wrong."""
    parts: list[str] = []
    for part in loc:
        chosen = (values.get("kind"), values.get("name")) if isinstance(values, dict) else ()
        if part in ("[key]", ONE, EACH) or (isinstance(values, dict) and part not in values and part in chosen):
            continue
        parts.append(str(part))
        if isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return parts


def unknown_key(key: str, known: list[str], asked: str = "") -> str:
    """Says that `key` is unknown and which may have been meant. `key`: the part of `asked` that is not there; `known`: the
    keys beside it."""
    if reason := REFUSED.get(asked or key):
        return f"{asked or key} is not supported: {reason}"
    parent, everywhere = key.rpartition(".")[0], list(_all_keys(RunConfig))
    if key in everywhere:
        hint = f" (a key of another {parent}=NAME)"
    else:
        close = nearest(asked or key, everywhere)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"unknown key {key!r}{hint}; {f'keys of {parent}' if parent else 'keys'}: {', '.join(known)}"


_CHOSEN = ("kind", "name")


def _all_keys(section: Any, path: str = "") -> Iterator[str]:
    """Every dotted key, of any choice; but not what a choice of sections sets (data=dataset: data.kind)."""
    for name, field in section.model_fields.items():
        below = _sections(field.annotation)
        for choice in below:
            yield from _all_keys(choice, f"{path}{name}.")
        if not below and name not in _CHOSEN:
            yield f"{path}{name}"


def _known_keys(path: list[str], values: Any) -> list[str]:
    section: Any = RunConfig
    for part in path:
        values = values[int(part) if isinstance(values, list) else part]
        kind = values.get("kind") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind in DATA:
            section = SETS[kind] if path[:2] == ["eval", "sets"] else DATA[kind]
            continue
        field = section.model_fields[part]
        choices = _sections(field.annotation)
        if tag := field.discriminator:
            choices = [c for c in choices if values[tag] in get_args(c.model_fields[tag].annotation)]
        section = choices[0] if choices else field.annotation
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold; a list of them is one value."""
    inside = () if get_origin(annotation) is tuple else get_args(annotation)
    return [c for c in (annotation, *inside) if isinstance(c, type) and issubclass(c, Section)]
