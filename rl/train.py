"""Builds a run and hands over: `python -m rl.train` (`command.py` says what its arguments are, `loop.py` what a run does)."""

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kernels.model import ModelConfig
from kernels.model.ahead import Serving
from kernels.model.ahead import prepare as prepare_kernels
from kernels.packages import version_of
from kernels.weights.beside import Beside, name_of
from kernels.weights.bucket import remove_leftovers
from rl.adapters import ADAPTER, base_folder, given
from rl.algorithms import Algorithm, open_algorithm
from rl.alone import Alone
from rl.carry import Carrying
from rl.checkpoints import Checkpoints, Progress, beside_files
from rl.cluster import RolloutFleet, TrainerFleet, cluster, left_at_once, training_of
from rl.cluster.hosted import Hosted, hosting
from rl.cluster.nodes import available
from rl.command import main
from rl.config import RunConfig
from rl.data import TRAIN, Problem, ProblemStream
from rl.environments.choice import set_environment
from rl.environments.tools import Tools
from rl.errors import RunError, UserError
from rl.evaluation import Evaluator, Evaluators, make_evaluator, make_set_evaluator
from rl.frozen_weights import begin_adapters, freeze, freeze_for_pairs, same
from rl.handover import Handover
from rl.hosted.asked import elsewhere
from rl.journal import Journal, Totals
from rl.lag import Lagging, carried, drawn_ahead
from rl.loop import Loop
from rl.memory import advised
from rl.model import beside, critic_model, model_config, remarks
from rl.out_dir import claim
from rl.plan import make_plan, print_plan
from rl.preferences import Preferences
from rl.prepare import Prepared, prepare
from rl.publish import Progress as Published
from rl.publish import check_served, publish
from rl.replay.keeper import Keeper
from rl.report import reported
from rl.requests import requests_for, train_sampling
from rl.resume import Start, find_start, logged, prepare_logs
from rl.run.banner import banner
from rl.run.files import write_atomic
from rl.run.log import RunLog
from rl.run.screen import Bar, Screen, Waiting
from rl.schedule import Schedule
from rl.speed import Drafting, speeds
from rl.step import Critic, Step
from rl.warm_start import Demonstrate, Demonstrations, Lessons, warm_start
from rollout.sampling import Request
from trainer.batch import Batch
from trainer.checkpoint import Checkpoint

Fleets = tuple[RolloutFleet, TrainerFleet]
StartProcesses = Callable[[RunConfig, ModelConfig, Checkpoint | None], contextlib.AbstractContextManager[Fleets]]
"""Starts the processes of a run, the trainer's with a checkpoint if there is one; ends them on the way out."""


def train(
    config: RunConfig,
    console: Screen,
    start: StartProcesses = cluster,
    make_algorithm: Callable[..., Algorithm] = open_algorithm,
    prepare: Callable[[RunConfig, Screen], Prepared] = prepare,
) -> dict[str, Any]:
    """Does the whole run; returns its summary. Raises a BAD_INPUT error before anything is started or written, if it can."""
    begun = time.perf_counter()
    if config.dry_run and config.model.hf.get("vocab_size") and not config.model.path:
        model = model_config(config, None)  # a plan needs no data
        budget = getattr(config.data, "max_prompt_tokens", 64)
        print_plan(config, model, make_plan(config, model, prompt_tokens=budget), console, nodes=available(config))
        return {}
    ready = prepare(config, console)
    for line in (*remarks(config, ready.model), *ready.warnings):
        console.warn(line)
    if config.dry_run:
        print_plan(config, ready.model, ready.plan, console, ready.source, available(config))
        return {}
    for line in banner(config, ready.model, ready.source, ready.judged_by, ready.plan, ready.sets):
        console.print(line)
    algorithm = make_algorithm(config.algorithm, config.rollout.max_new_tokens)
    with contextlib.ExitStack() as stack:
        stack.enter_context(advised(config, ready.plan))
        out_dir = stack.enter_context(claim(Path(config.out_dir)))
        begin = _begin(config, ready, out_dir, console)
        with Waiting(console, f"starting {ready.plan.rollout_processes + ready.plan.trainer_processes} processes"):
            fleets = stack.enter_context(start(config, ready.model, begin.checkpoint))
        hosted = _host(stack, config, ready, fleets, console)
        log = _open_log(stack, config, begin, out_dir, console)
        totals = Totals(begin.progress.tokens_compared, begin.progress.tokens_nonzero)
        parts = Parts(
            config=config,
            ready=ready,
            rollout=fleets[0],
            trainer=fleets[1],
            cards=Handover(*fleets, config.cluster.placement == "colocated"),
            journal=Journal(log, ready.source.tokenizer, config.numerics, config.warmup.steps, totals),
            checkpoints=_checkpoints(config, ready, fleets[1], log, begun - begin.progress.seconds),
            console=console,
            hosted=hosted,
        )
        summary = parts.run(begin, algorithm)
        summary["seconds"] = round(time.perf_counter() - begun + begin.progress.seconds, 1)
        log.finish(summary)
    return summary


def _begin(config: RunConfig, ready: Prepared, out_dir: Path, console: Screen) -> Start:
    """Says where the run begins, now that nobody else writes there; frees memory that killed runs hold, and compiles what
    it needs."""
    with Waiting(console, "reading the checkpoint"):
        begin = find_start(config, ready.identity, thorough=True)
    for reason in begin.refused:
        print(f"samebit: checkpoint refused: {reason}", file=sys.stderr)
        console.note(f"checkpoint refused: {reason}")
    logged(begin, out_dir)  # says what is missing of them
    for path, size in remove_leftovers():
        console.print(f"removed {path} ({size / 2**20:,.1f} MiB of memory), which a run that was killed left behind")
    compile_kernels(config, ready.model, console.print)
    return begin


def compile_kernels(config: RunConfig, model: ModelConfig, say: Callable[[str], None]) -> None:
    """Compiles what a run on a GPU needs; they are kept for the runs that follow."""
    if config.device == "cuda" and torch.cuda.is_available():  # the driver may be on a node without a card
        section = config.rollout
        serving = Serving(section.tp, section.page_size, section.limits.rows, model.max_positions)
        prepare_kernels(model, config.dtype, serving, True, say, config.kernels.family)


def _host(
    stack: contextlib.ExitStack, config: RunConfig, ready: Prepared, fleets: Fleets, console: Screen
) -> Mapping[str, Hosted]:
    """Starts the actors of the models that transformers computes, by the key that asks for each."""
    if not ready.hosted and not ready.rewards:
        return {}
    ranks = (*fleets[1].places, *(recipient.place for recipient in fleets[0].recipients))
    with Waiting(console, "loading the models that transformers computes"):
        hosted = stack.enter_context(hosting(config, ready.hosted, ready.rewards, ranks))
    for key, one in hosted.items():
        console.print(f"{key}: transformers computes it, on {one.placed}")
    return hosted


def _open_log(stack: contextlib.ExitStack, config: RunConfig, begin: Start, out_dir: Path, console: Screen) -> RunLog:
    """Makes the folder a run's: its config, its logs, cut where it goes on, and the report at the end."""
    values = config.model_dump(mode="json")
    write_atomic(out_dir / "config.yaml", yaml.safe_dump(values, sort_keys=False))
    positions = prepare_logs(begin, out_dir)
    stack.enter_context(console.keep(out_dir / "train.log"))
    stack.enter_context(reported(out_dir))
    log = stack.enter_context(RunLog(out_dir, values, config.logger, out_dir.name, positions))
    for kind, where in log.shown_at.items():
        console.print(f"{kind:<13}  {where}")
    return log


def _checkpoints(config: RunConfig, ready: Prepared, trainer: TrainerFleet, log: RunLog, since: float) -> Checkpoints:
    saved = beside(config, ready.model, ready.source.tokenizer)
    files = beside_files(saved, ready.model) if config.checkpoint.every else {}
    values = config.model_dump(mode="json")
    facts: dict[str, Any] = {"identity": ready.identity, "config": values, "versions": _versions(config.device)}
    if config.adapter.ranks and (path := given(config)):
        facts["base"] = str(Path(path).absolute())
    return Checkpoints(log.out_dir, config.checkpoint, trainer, ready.model, log, since, files, facts)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Holds what a run works with, once its processes are there and its folder is open."""

    config: RunConfig
    ready: Prepared
    rollout: RolloutFleet
    trainer: TrainerFleet
    cards: Handover
    journal: Journal
    checkpoints: Checkpoints
    console: Screen
    hosted: Mapping[str, Hosted]  # models that transformers computes, by the key that asks for them

    def run(self, begin: Start, algorithm: Algorithm) -> dict[str, Any]:
        """Does the warm start and the loop, and saves the model; returns the summary."""
        config, ready, state = self.config, self.ready, begin.progress
        if begin.checkpoint:
            if self.trainer.digest() != begin.checkpoint.weights_sha256:
                if begin.checkpoint.model.adapter:
                    raise UserError(
                        f"{base_folder(config)} has other weights than those under the adapters of {begin.checkpoint.folder}"
                    )
                raise RunError(f"{begin.checkpoint.folder} was restored, and its weights have another digest")
            self.console.print(f"resumed {begin.checkpoint.folder}")
        elif begin.continues:
            self.console.print("no checkpoint yet: the run starts again")
        if config.numerics != "exact":
            self.console.print(f"numerics={config.numerics}: a contrast run, of which nothing is promised")
        state = self._warm_start(state)
        kept = beside(config, ready.model, ready.source.tokenizer)
        state = begin_adapters(config, ready.model, self.trainer, begin.checkpoint, state, self.checkpoints, kept)
        with Waiting(self.console, "bringing the frozen model") if ready.frozen else contextlib.nullcontext():
            state = freeze(ready.frozen, self.trainer, begin, state, Path(config.out_dir), kept)
        if ready.hosted:
            found = self.hosted[ready.hosted.key].ask("digest")
            state = same(ready.hosted.key, ready.hosted.path, found, state, begun=state.step > 0)
        if config.algorithm.critic:
            training = training_of(config, prefix="critic.")
            self.trainer.begin_critic(critic_model(ready.model), training, restored=state.step > 0)
        step = self.step(algorithm)
        before, after = self.loop(step, begin).run(state) if config.mode == "full" else self._alone(step)
        with Waiting(self.console, "saving the last checkpoint and the model"):
            self.checkpoints.settle(wait=True)
            self.cards.to_trainer(weights_stay=False)
            weights = self._save(kept)
        return {
            "weights_sha256": weights,
            "eval_accuracy_before": before,
            "eval_accuracy_after": after,
            "judged_by": ready.judged_by,
            "tokens_compared": self.journal.totals.tokens_compared,
            "tokens_nonzero": self.journal.totals.tokens_nonzero,
            "steps": config.steps,
            "memory": self._memory(),
            "device": config.device,
            "numerics": config.numerics,
            "elsewhere": elsewhere(config),
            "versions": _versions(config.device),
        }

    def _save(self, beside: Beside) -> str:
        """Saves what was trained, if it is to be saved: the model, or its adapters. Returns the digest of the weights."""
        config, out_dir = self.config, Path(self.config.out_dir).absolute()
        if not config.adapter.ranks:
            return self.trainer.save(str(out_dir / "model") if config.save_model else "", beside)
        if config.save_model:
            self.trainer.save_adapter(str(out_dir / ADAPTER), base_folder(config))
        return self.trainer.save("", beside)

    def _demonstrate(self) -> Demonstrate | None:
        """Returns what plays conversations for the warm start; None where solutions are shown."""
        environment = self.ready.environment
        if not isinstance(environment, Tools) or not environment.teaches:
            return None
        sampling = train_sampling(self.config.rollout, self.ready.source.tokenizer.ends)
        return partial(environment.demonstrate, sampling=sampling)

    def _warm_start(self, state: Progress) -> Progress:
        """Takes the supervised steps that are still to be done."""
        section, ready = self.config.warmup, self.ready
        if state.supervised == section.steps:
            return state
        shown = (section, ready.source, self.config.seed, self.config.rollout.max_new_tokens, state.warmup_cursor)
        lessons: Lessons = Demonstrations(*shown, self._demonstrate())
        if ready.paired:
            lessons = Preferences(*shown, self.trainer)
            state = freeze_for_pairs(ready.paired, self.trainer, state)
        state = warm_start(
            section, lessons, self.trainer, state, self.checkpoints, self.journal.supervised, self.console
        )
        if ready.paired:
            self.trainer.thaw()
        return state

    def _alone(self, step: Step) -> tuple[None, None]:
        """Takes one half of the steps; nothing is evaluated."""
        half = Alone(step, self.bar, self.config.steps)
        if self.config.batches is None:
            half.sample()
        else:
            half.train(Path(self.config.batches))
        return None, None

    def _keeper(self) -> Keeper:
        config, steps = self.config, frozenset(self.config.align.keep_batches)
        where = {"device": config.device, "family": config.kernels.family}
        about = {"numerics": config.numerics, "dtype": name_of(config.dtype), **where}
        sidecar = beside(config, self.ready.model, self.ready.source.tokenizer)
        asked = (lambda step: True) if config.mode == "rollout_only" else steps.__contains__
        if config.mode == "train_only":
            asked = frozenset[int]().__contains__
        save = partial(self.trainer.save, beside=sidecar)
        return Keeper(Path(config.out_dir), asked, about, save, self.console.print)

    @cached_property
    def bar(self) -> Bar:
        """Returns what shows the GRPO steps."""
        return Bar(self.console, "GRPO")

    @cached_property
    def stream(self) -> ProblemStream:
        """Returns the problems in the run's order."""
        return self.ready.source.stream(self.config.seed, TRAIN)

    def _speeds(self) -> Callable[[Batch, dict[str, Any]], dict[str, float]]:
        config, drafting = self.config, Drafting(self.rollout.drafts)
        epochs, ranks, on_gpu = config.algorithm.update_epochs, config.trainer.world_size, config.device == "cuda"

        def measure(batch: Batch, metrics: dict[str, Any]) -> dict[str, float]:
            out = speeds(self.ready.model, batch, metrics, epochs, ranks, on_gpu)
            return out | drafting() if config.rollout.speculate == "auto" else out

        return measure

    def step(self, algorithm: Algorithm) -> Step:
        """Builds what takes a GRPO step."""
        config, trainer = self.config, self.config.trainer
        section, asked = config.algorithm, config.algorithm.critic
        sampling = train_sampling(config.rollout, self.ready.source.tokenizer.ends)

        def requests(problems: Sequence[Problem], step: int, first: int) -> list[Request]:
            return requests_for(problems, section.group_size, sampling, config.seed, "train", step, first)

        def schedule(lr: float) -> Schedule:
            return Schedule(lr, trainer.lr_schedule, trainer.lr_warmup_steps, config.steps)

        return Step(
            stream=self.stream,
            requests_for=requests,
            environment=self.ready.environment,
            algorithm=algorithm,
            rollout=self.rollout,
            trainer=self.trainer,
            cards=self.cards,
            journal=self.journal,
            publish=self._publish,
            phase=self.bar.phase,
            prompts=section.prompts_per_step,
            rounds=section.sampling_rounds,
            mini_batches=section.mini_batches,
            epochs=section.update_epochs,
            reference=self._reference(),
            lr=schedule(trainer.lr),
            critic=Critic(asked.loss, schedule(asked.lr)) if asked else None,
            policy=config.align.policy if config.numerics == "exact" else "record",
            keeper=self._keeper(),
        )

    def _reference(self) -> Callable[[Batch], np.ndarray] | None:
        """Returns what computes the log-probs of the frozen model; None where the algorithm asks none."""
        if self.ready.hosted:
            return partial(self.hosted[self.ready.hosted.key].ask, "logprobs")
        return self.trainer.frozen_logprobs if self.ready.frozen else None

    def _lagging(self, step: Step, begin: Start) -> Lagging:
        """Lets sampling be ahead, or carry samples over. Where the run may go on after its last step, what that one needs is
        drawn too."""
        config, tokens = self.config, self.config.rollout.carry
        last = None if config.checkpoint.every else config.steps
        at_once = config.cluster.placement == "split"
        carrying = Carrying(step, tokens, carried(begin)) if tokens else None
        return Lagging(step, config.algorithm.lag, config.align.every, last, at_once, drawn_ahead(begin), carrying)

    def loop(self, step: Step, begin: Start) -> Loop:
        """Builds the loop over GRPO steps."""
        config, ready = self.config, self.ready
        own = make_evaluator(config, ready.source, ready.environment, ready.judged_by)
        return Loop(
            step=self._lagging(step, begin) if config.algorithm.lag or config.rollout.carry else step,
            stream=self.stream,
            evaluate=partial(
                Evaluators(own, self._set_evaluators()),
                generate=self.rollout.generate,
                cards=self.cards,
                compare=partial(check_served, self.rollout),
                console=self.console,
            ),
            speeds=self._speeds(),
            trainer=self.trainer,
            cards=self.cards,
            journal=self.journal,
            checkpoints=self.checkpoints,
            bar=self.bar,
            steps=config.steps,
            eval_every=config.eval.every,
        )

    def _set_evaluators(self) -> dict[str, Evaluator]:
        """Makes the evaluation on every set of `eval.sets`, judged by the set's own reward."""
        tokenizer, sets, environment = self.ready.source.tokenizer, self.ready.sets, self.ready.environment
        hosts = environment.hosts if isinstance(environment, Tools) else None
        how = tokenizer, hosts, self.console.warn
        own = {n: set_environment(self.config, n, one.problems, one.reward, *how) for n, one in sets.items()}
        return {name: make_set_evaluator(self.config, name, s, tokenizer.ends, own[name]) for name, s in sets.items()}

    def _publish(self, version: int) -> tuple[int, int]:
        """Publishes the trainer's weights: both sides hold the same bits after this, or the run stops. Returns the bytes that
        were carried, and those of them that crossed the network."""
        publish_aloud(self.console, version, partial(publish, self.trainer, self.rollout, version))
        self.checkpoints.settle()
        return self.rollout.packed, sum(self.rollout.crossed.values())

    def _memory(self) -> dict[str, float]:
        """Returns GiB of the fullest rank of each kind, over the steps of this process, and what was planned."""
        plan = self.ready.plan
        found = {
            "trainer_peak_gib": self.journal.totals.peak_bytes,
            "trainer_planned_gib": plan.trainer_bytes,
            "rollout_peak_gib": self.rollout.peak_bytes(),
            "rollout_planned_gib": plan.rollout_bytes,
        }
        return {name: round(size / 2**30, 3) for name, size in found.items()}


def publish_aloud(console: Screen, version: int, send: Callable[[Published], object]) -> None:
    """Publishes by `send`; says how far that is, where it takes long."""
    what = f"publishing the weights of version {version}"
    with Waiting(console, f"{what}, by buckets") as waiting:

        def progress(done: int, of: int) -> None:
            waiting.done, waiting.total = done, of
            if done == of:
                waiting.what = f"{what}: all buckets are there, comparing what was sent and received"

        send(progress)


def _versions(device: str) -> dict[str, str]:
    packages = ["samebit", "torch", "ray", "transformers", "numpy"]
    packages += ["triton"] if device == "cuda" else []
    found = {name: version for name in packages if (version := version_of(name))}
    return {"python": platform.python_version()} | found


if __name__ == "__main__":
    with left_at_once():
        main(train, prepare)
