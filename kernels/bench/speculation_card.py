"""What drafted tokens bring on one GPU, as a function of how often they are right: an oracle knows what each sample will say,
and says a given share of its tokens right, drawn at random. Beside it the same samples without drafts, in the same engine.

A run decodes the same samples twice, of which the second is timed while the batch is whole, until its first sample ends. How
much is drafted follows from what was measured before, as it does in an engine that has been running for a while.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from kernels.bench.serving_card import MOST, Work, requests, start_engine
from kernels.bench.table import console, show
from kernels.bench.timer import versions
from kernels.host.command import progress
from kernels.model import known
from rollout.drafts.drafter import Draft
from rollout.drafts.pace import Pace
from rollout.drafts.speculation import Speculation
from rollout.engine import Engine
from rollout.graphs import padded
from rollout.sampling import Completion
from rollout.sequence import Sequence as Sample

BATCHES = (1, 4, 16, 64)
CHANCES = (0.0, 0.25, 0.5, 0.75, 1.0)
TARGETS = {0.0: 0.97, 0.5: 1.6}  # of plain decoding, the second for a batch of up to 16
WORK = Work("speculate", "drafts", max(BATCHES), 128, 120)


class Oracle:
    """Drafts what will be said, but for a share of 1 - `chance` of the tokens of each sample, the same whenever it is asked."""

    def __init__(self, truth: Sequence[Completion], chance: float, vocab: int) -> None:
        generator, self.said = random.Random(0), [list(c.token_ids) for c in truth]
        for said in self.said:
            for place in generator.sample(range(len(said)), round((1 - chance) * len(said))):
                said[place] = (said[place] + 1) % vocab

    def draft(self, sequences: Sequence[Sample], most: int) -> list[Draft | None]:
        """Proposes what it was given, as `Drafter.draft` asks."""
        asked = [(self.said[s.request.id], s.sampled) for s in sequences]
        return [Draft(said[at : at + most], "oracle") for said, at in asked]

    def ended(self, sequence: Sample) -> None:
        """Needs nothing of it."""


@dataclass(frozen=True)
class Result:
    """Holds a line of the table."""

    batch: int
    plain: float  # tokens a second without drafts
    ratios: dict[str, float]  # by the chance: tokens a second with drafts / without
    tokens_a_draw: dict[str, float]  # of the steps that were drafted for
    drafted_share: dict[str, float]  # of all tokens, the ones that such steps brought

    @property
    def met(self) -> bool:
        """Says whether the targets that apply are reached."""
        return all(self.ratios[str(c)] >= t for c, t in TARGETS.items() if c == 0 or self.batch <= 16)


def decoded(engine: Engine, batch: int) -> tuple[list[Completion], float]:
    """Returns (completions, tokens a second) of a batch that has begun and is whole."""
    asked = requests(WORK, WORK.new)[:batch]
    for request in asked:
        engine.add(request)
    done: list[Completion] = []
    while len(engine.scheduler.running) < batch or min(s.sampled for s in engine.scheduler.running) < 1:
        done += engine.step()
    before, begin = sum(s.sampled for s in engine.scheduler.running), time.perf_counter()
    while not done:
        done += engine.step()  # returns when tokens have arrived
    spent = time.perf_counter() - begin
    gained = sum(s.sampled for s in engine.scheduler.running) + sum(len(c.token_ids) for c in done) - before
    while not engine.idle:
        done += engine.step()
    engine.forget()
    return sorted(done, key=lambda c: c.request_id), gained / spent


def measured(engine: Engine, batch: int, say: Callable[[str], None]) -> Result:
    """Times a batch without drafts and with those of each chance, and checks that they say the same."""
    config = engine.runner.config
    engine.speculation = None
    decoded(engine, batch)
    truth, plain = decoded(engine, batch)
    ratios, tokens, shares = {}, {}, {}
    for chance in CHANCES:
        oracle, pace = Oracle(truth, chance, config.vocab_size), Pace(engine.config.limits.rows)
        speculation = engine.speculation = Speculation([oracle], pace, config.vocab_size, engine.config.overlap)
        decoded(engine, batch)
        before = speculation.counts.tokens, speculation.counts.draws
        said, rate = decoded(engine, batch)
        if said != truth:
            raise RuntimeError(f"batch {batch}, acceptance {chance}: drafts changed what was said")
        brought, draws = (getattr(speculation.counts, n) - b for n, b in zip(("tokens", "draws"), before, strict=True))
        ratios[str(chance)], shares[str(chance)] = rate / plain, brought / (batch * WORK.new)
        tokens[str(chance)] = brought / draws if draws else 1.0
        say(f"batch {batch}, acceptance {chance}: {rate:,.0f} tokens/s, {ratios[str(chance)]:.2f} of {plain:,.0f}")
    return Result(batch, plain, ratios, tokens, shares)


@torch.no_grad()
def run(model: str, path: Path | None, beside: bool) -> None:
    """Times every batch, prints the table and keeps it in `path`; `beside` what is there already."""
    config, out, begin = replace(known.ON_CARDS[model], max_positions=MOST), console(), time.perf_counter()

    def say(text: str) -> None:
        out.print(f"[dim]{time.perf_counter() - begin:5.0f} s[/] {text}")

    engine = start_engine(config, [WORK], "auto")
    assert engine.runner.graphs
    sizes = [size for size in range(1, engine.config.limits.rows + 1) if padded(size) == size]
    for size in progress(sizes):
        engine.runner.graphs.prepare([size], WORK.given + WORK.new)
    say(f"{len(engine.runner.graphs.graphs)} graphs are captured")
    results = [measured(engine, batch, say) for batch in BATCHES]
    print_table(results, out)
    if path:
        kept = json.loads(path.read_text()) if beside else dict(versions())
        kept["speculate"] = [{**asdict(r), "met": r.met} for r in results]
        path.write_text(json.dumps(kept, indent=1) + "\n")


def print_table(results: Sequence[Result], out: Console) -> None:
    """Prints a line for each batch."""
    heads = ("tokens/s without", *(f"right {chance:.0%}" for chance in CHANCES), "targets")
    rows = []
    for r in results:
        cells = (f"{r.ratios[str(c)]:.2f} ({r.tokens_a_draw[str(c)]:.1f} a draw)" for c in CHANCES)
        rows.append((f"batch {r.batch}", f"{r.plain:,.0f}", *cells, "[green]met[/]" if r.met else "[red]not met[/]"))
    show(out, ("drafts",), heads, rows)
