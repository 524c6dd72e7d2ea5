"""Says in a run's logs what each step did: rewards, lengths, the loss, and how far sampler and trainer are apart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rl.environments.conversation import Played, summed
from rl.metrics import Mismatch, divergence, profile, worst
from rl.run.log import RunLog
from rl.samples import Group, Sample
from rl.updates import Update, measure
from rollout.sampling import Completion
from rollout.tokenizer import Tokenizer
from trainer.batch import Batch, StepReport

_SHOWN = 8  # completions kept of each logged step


@dataclass
class Totals:
    """Counts over all GRPO steps; the largest memory over those of this process."""

    tokens_compared: int = 0
    tokens_nonzero: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Compared:
    """Holds what the trainer says, by the weights that drew a batch, of its loss rows: float32 [R]."""

    batch: Batch
    logprobs: np.ndarray
    places: np.ndarray | None = (
        None  # int64 [R], of the rows among their sequence's sampled tokens; None: those are all rows
    )


class Journal:
    """Numbers the rows of the log: the supervised steps come first, then the evaluation before GRPO, then its steps."""

    def __init__(self, log: RunLog, tokenizer: Tokenizer, numerics: str, supervised: int, totals: Totals) -> None:
        """`supervised`: steps of the warm start."""
        self._log, self._tokenizer, self._first, self.totals = log, tokenizer, supervised, totals
        self._stamp = {} if numerics == "exact" else {"numerics": numerics}
        self._alerted = False

    def supervised(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs a supervised step."""
        self._log.step(step, metrics | self._stamp)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs GRPO step `step`; 0 and the one after the last are the evaluations before and after. The first step of an exact
        run in which a bit differs is an alert too."""
        self._log.step(self._first + step, {"phase": "grpo"} | metrics | self._stamp)
        if metrics.get("divergence/tokens_nonzero") and not self._stamp and not self._alerted:
            self._alerted = True
            self._log.alert("samebit: sampler and trainer differ", _differ(step, metrics))

    def measure(
        self,
        step: int,
        groups: Sequence[Group],
        batch: Batch,
        updates: Sequence[Update],
        compared: Compared | None,
    ) -> dict[str, Any]:
        """Returns the metrics of a step, and adds it to the totals. `compared`: None where no token of it was."""
        metrics = {"grpo/step": step} | describe(groups, batch, updates[0].report)
        lag = int(step - 1 - batch.versions.min(initial=step - 1))
        metrics["policy/version_lag"] = lag
        metrics["policy/version_lag_mean"] = float(step - 1 - batch.versions.mean())
        self.totals.peak_bytes = max(self.totals.peak_bytes, *(u.report.peak_bytes for u in updates))
        if compared:
            metrics |= compare(compared)
            self.totals.tokens_compared += len(compared.batch.rows)
            self.totals.tokens_nonzero += int(metrics["divergence/tokens_nonzero"])
        return metrics | measure(updates, on_policy=0 if lag else 1)

    def completions(self, step: int, groups: Sequence[Group], compared: Compared, every: bool) -> None:
        """Keeps a completion that is worse than all before it, and with `every` the first sample of the first groups, with
        both sides' log-probs of each token. What is compared: all groups or the first ones."""
        batch, logprobs = compared.batch, compared.logprobs
        samples = [(group, sample) for group in groups for sample in group.samples][: batch.sequences]
        counts = batch.counts
        firsts = [i for i, (group, sample) in enumerate(samples) if sample is group.samples[0] and counts[i]]
        chosen = firsts[:_SHOWN] if every else []
        if len(batch.rows):
            badness, row = worst(logprobs, batch.logprobs)
            if self._log.worst is None or badness > self._log.worst:
                chosen = list(dict.fromkeys([*chosen, int(batch.sequence[row])]))
        self._log.completions(self._first + step, (self._row(*samples[i], i, compared) for i in chosen))

    def _row(self, group: Group, sample: Sample, i: int, compared: Compared) -> dict[str, Any]:
        """Describes sequence `i` of the batch: its sampled tokens, of all its turns, with both sides' log-probs."""
        batch = compared.batch
        mine = batch.sequence == i
        ids = batch.token_ids[batch.rows[mine]].tolist()
        return {
            "prompt": group.problem.prompt,
            "completion": sample.text,
            **({"messages": list(told)} if (told := _messages(sample)) else {}),
            "answer": group.problem.answer,
            "reward": sample.reward,
            "rewards": dict(sample.parts),
            **({"notes": dict(sample.notes)} if sample.notes else {}),
            **({"error": sample.error} if sample.error else {}),
            "tokens": ids,
            "token_texts": [self._tokenizer.decode([t], special=True) for t in ids],
            "logprobs": batch.logprobs[mine].tolist(),
            "trainer_logprobs": compared.logprobs[mine].tolist(),
        }


def _messages(sample: Sample) -> Sequence[Mapping[str, Any]]:
    """Returns the messages of a conversation with tools, after its prompt."""
    return sample.transcript.outcome.messages if isinstance(sample.transcript, Played) else ()


def _differ(step: int, metrics: Mapping[str, Any]) -> str:
    return (
        f"step {step}: {int(metrics['divergence/tokens_nonzero']):,} of {int(metrics['divergence/tokens_compared']):,} "
        f"log-probs differ in a bit, by {metrics['divergence/logprob_abs_diff_max']:.3g} at most"
    )


def found(mismatch: Mismatch | None) -> dict[str, Any]:
    """Returns the metric of a check that went on."""
    return {"divergence/first_mismatch": asdict(mismatch)} if mismatch else {}


def compare(compared: Compared) -> dict[str, Any]:
    """Measures how far the two sides' log-probs are apart, and where."""
    batch, logprobs, place = compared.batch, compared.logprobs, compared.places
    sequence = batch.sequence
    if place is None:
        place = np.arange(len(sequence)) - (np.cumsum(batch.counts) - batch.counts)[sequence]
    return {**divergence(logprobs, batch.logprobs, sequence), **profile(logprobs, batch.logprobs, place)}


def describe(groups: Sequence[Group], batch: Batch, report: StepReport) -> dict[str, Any]:
    """Sums up rewards, lengths, and what the trainer reports."""
    ends = [c.finish_reason for g in groups for s in g.samples for c in s.completions]
    return {
        **rewards(groups),
        **conversations([sample for group in groups for sample in group.samples]),
        "response/length_mean": float(batch.counts.mean()),
        "response/truncated_frac": float(np.mean([reason == "length" for reason in ends])),
        "policy/entropy": float(-report.logprobs.mean(dtype=np.float64)),  # Monte Carlo: the tokens are its own samples
        "policy/loss": report.loss,
        "policy/grad_norm": report.grad_norm,
        "policy/clip_fraction": report.clip_fraction,
        "memory/trainer_peak_gib": report.peak_bytes / 2**30,
        "memory/trainer_host_peak_gib": report.host_peak_bytes / 2**30,
        **(report.routing.metrics() if report.routing else {}),
    }


def conversations(samples: Sequence[Sample]) -> dict[str, float]:
    """Sums up what environments counted, and how many tokens of their turns' prompts came from the prefix cache; nothing where
    there is nothing to count."""
    counted = [sample.counts for sample in samples if sample.counts]
    if not counted:
        return {}
    prompts = sum(place for s in samples for place in _places(s))
    cached = sum(c.cached_tokens for s in samples for c in s.completions)
    return {**summed(counted), "speed/cached_prompt_frac": cached / max(prompts, 1)}


def _places(sample: Sample) -> list[int]:
    """Returns the tokens before each completion of a sample."""
    places, length = list[int](), 0
    for piece in sample.transcript:
        if isinstance(piece, Completion):
            places.append(length)
        length += len(piece.token_ids if isinstance(piece, Completion) else piece)
    return places


def rewards(groups: Sequence[Group]) -> dict[str, float]:
    """Sums up rewards: of the sum, over the samples that have one, and by name, over those that each has a say in; NaN where
    there are none."""
    samples = [sample for group in groups for sample in group.samples]
    earned = np.array([s.reward for s in samples if s.reward is not None])
    judged = [{r for r in group.rewards if r is not None} for group in groups]
    named: dict[str, list[float]] = {}
    for sample in samples:
        numbers = {what: x for what, x in sample.notes.items() if isinstance(x, int | float)}
        for name, value in ({**sample.parts, **numbers}).items():
            named.setdefault(name, []).append(float(value))
    return {
        "reward/mean": float(earned.mean()) if len(earned) else math.nan,
        "reward/std": float(earned.std()) if len(earned) else math.nan,
        "reward/solved_frac": float((earned >= 1).mean()) if len(earned) else math.nan,
        "reward/groups_without_signal_frac": len([rs for rs in judged if len(rs) <= 1]) / len(judged),
        "reward/left_out": len([s for s in samples if s.reward is None]),
        "reward/errors": len([s for s in samples if s.error]),
        **{f"reward/{name}": math.fsum(values) / len(values) for name, values in named.items()},
    }
