"""The engine at Qwen3-8B's or Qwen3-30B-A3B's shapes on one GPU, beside `transformers`' continuous batching, in one run.

Work of both: temperature 1, the log-prob of each sampled token, no end of text, random prompts. A decode step is the wall clock
of the steps of a running batch over their number, host included. Beside it stands what copying at the card's measured bandwidth
would take for the bytes a step must read (weights once, keys and values of every sequence once), and the same graph replayed
without a host between, which shows what the host costs.

The peer holds the same weights (views of ours) and runs after our cache is freed. It is far slower on a card without a flash
attention package, so it decodes `--peer-new` tokens of each request: its rate over the whole work is projected from its own
timestamps, first tokens + the median of its steps, which favours it as contexts grow. It holds experts otherwise, so that a
mixture has no peer here: two copies of its weights are more than a card has. Nor has a model whose projections are quantized.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from kernels.bench.table import console, show
from kernels.bench.timer import ceilings, versions
from kernels.host.command import write_json
from kernels.model import ModelConfig, costs, known, served
from kernels.model.formats import PLAIN, Format
from kernels.ops import Quantized
from kernels.weights.files import to_hf
from rollout.engine import Engine, EngineConfig, freeze_heap
from rollout.keys import Speculate
from rollout.sampling import Request, SamplingParams
from rollout.scheduler import Limits

MOST = 8192  # positions
PAGE = 16
CHUNK = 16384


@dataclass(frozen=True)
class Work:
    """Describes a row: `prompts` of `given` tokens, `samples` of each, `new` tokens a sample."""

    rows: str  # the name that chooses it
    case: str
    prompts: int
    given: int
    new: int
    samples: int = 1
    unit: str = "output tokens/s"  # or prompt tokens/s, or ms a step
    target: float = 0.0  # at least; at most where the unit is ms

    @property
    def sequences(self) -> int:
        """Counts the sequences in flight: every prompt's samples."""
        return self.prompts * self.samples


DENSE = [
    Work("decode", "decode, batch 1, 128 in, 128 out", 1, 128, 128, unit="ms a step", target=6.9),
    Work("decode", "decode, batch 16", 16, 128, 128, unit="ms a step", target=7.2),
    Work("decode", "decode, batch 64", 64, 128, 128, unit="ms a step", target=8.1),
    Work("decode", "decode, batch 256", 256, 128, 128, unit="ms a step", target=12.8),
    Work("throughput", "256 requests, 512 in, 512 out", 256, 512, 512, target=10100),
    Work("prefix", "32 prompts x 8 samples, 256 in, 512 out", 32, 256, 512, 8, target=16500),
    Work("prefill", "prefill, 16 x 4,000 tokens", 16, 4000, 1, unit="prompt tokens/s", target=38000),
]
TARGETS = {"qwen3_8b": [work.target for work in DENSE], "qwen3_30b_a3b": [3.2, 10.5, 15.5, 17.5, 10000, 0, 63000]}
"""By model, of each row; 0: none."""
QUANTIZED_TARGETS = [4.0, 4.3, 5.2, 9.5, 12500, 0, 52000]
"""The same of Qwen3-8B in block-scaled FP8."""


@dataclass(frozen=True)
class Timing:
    """Holds the seconds of one work."""

    whole: float
    step: float  # of one decode step
    replay: float | None = None  # of its graph alone


@dataclass(frozen=True)
class Result:
    """Holds a line of the table."""

    case: str
    unit: str
    target: float
    ours: float
    transformers: float | None
    ratio: float | None  # above 1 we are faster
    of_copy: float | None  # share of what the copy bandwidth allows a decode step
    host_gap: float | None  # share of a decode step that its graph alone does not need

    @property
    def met(self) -> bool:
        """Says whether the target is reached, which is an upper bound for times and a lower one for rates."""
        return self.ours <= self.target if self.unit == "ms a step" else self.ours >= self.target


def figure(work: Work, timing: Timing) -> float:
    """Turns seconds into the unit of a row."""
    if work.unit == "ms a step":
        return timing.step * 1e3
    tokens = work.sequences * work.new if work.unit == "output tokens/s" else work.prompts * work.given
    return tokens / timing.whole


def works_of(model: str, rows: Sequence[str], format: Format) -> list[Work]:
    """Lists the rows of these names, with the targets of a model in a format."""
    targets = TARGETS[model] if format == PLAIN else QUANTIZED_TARGETS
    return [replace(w, target=t) for w, t in zip(DENSE, targets, strict=True) if w.rows in rows]


def tokens_of(work: Work) -> int:
    """Counts the tokens whose keys and values a row holds at once, its last pages included."""
    return work.sequences * (work.given + work.new + PAGE)


def prompts(work: Work) -> list[tuple[int, ...]]:
    """Draws the prompts of a row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, known.QWEN3_8B.vocab_size, (work.prompts, work.given), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def requests(work: Work, new: int) -> list[Request]:
    """Asks for `new` tokens of each sample of a row."""
    return [Request(i, p, SamplingParams(new, seed=i, n=work.samples)) for i, p in enumerate(prompts(work))]


def seconds(run: Callable[[], object]) -> float:
    """Returns the wall clock of one run, host included, from an idle card to an idle card."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


# Ours -----------------------------------------------------------------------------------------------------------------


def start_engine(config: ModelConfig, works: Sequence[Work], speculate: Speculate = "off") -> Engine:
    """Starts the engine of all rows. Weights are drawn on the card: matrices of `init_std`, norms of ones.
    `Engine.load` would hash 16 GB first."""
    tokens = max(map(tokens_of, works))
    running = max(work.sequences for work in works)
    limits = Limits(running, CHUNK, CHUNK)
    how = EngineConfig(
        tokens // PAGE, PAGE, True, limits, torch.bfloat16, "cuda", cuda_graphs=True, overlap=True, speculate=speculate
    )
    engine = Engine(config, how)
    torch.cuda.manual_seed(0)
    for parameter in served(config):
        held = engine.runner.weights[parameter.name]
        if isinstance(held, Quantized):
            drawn = torch.empty(held.shape, dtype=torch.bfloat16, device=held.device)
            engine.runner.load(parameter, drawn.normal_(0, config.init_std))
        elif parameter.columns:
            held.normal_(0, config.init_std)
        else:
            held.fill_(1)
    engine.version = 0
    freeze_heap()
    return engine


def ours(engine: Engine, work: Work) -> Timing:
    """Times a row; what compiles and captures graphs is not counted."""
    graphs = engine.runner.graphs
    assert graphs
    graphs.prepare(range(1, work.sequences + 1), work.given + work.new)  # requests end one after another
    count = work.prompts if work.rows == "prefill" else 2 * CHUNK // work.given
    engine.generate(requests(work, 2)[:count])
    engine.forget()
    if work.unit == "ms a step":
        return decode_step(engine, work)
    asked = requests(work, work.new)
    whole = seconds(lambda: engine.generate(asked))
    engine.forget()
    return Timing(whole, whole / work.new)


def decode_step(engine: Engine, work: Work) -> Timing:
    """Times the steps of a running batch, and the graph of one of them alone."""
    for request in requests(work, work.new):
        engine.add(request)

    def decoding() -> None:
        while not engine.scheduler.running or min(s.sampled for s in engine.scheduler.running) < 2:
            engine.step()

    prefill = seconds(decoding)
    steps = work.new - 6
    begin = time.perf_counter()
    for _ in range(steps):
        engine.step()
    step = (time.perf_counter() - begin) / steps  # a step ends with the arrival of a step's tokens: nothing is left out
    graph = engine.runner.graphs.graphs[work.sequences, engine.runner.graphs.width_of(work.given + work.new), False][0]  # type: ignore[union-attr]
    graph.replay()

    def replays() -> None:
        for _ in range(20):
            graph.replay()

    replay = seconds(replays) / 20
    while not engine.idle:
        engine.step()
    engine.forget()
    return Timing(prefill + step * work.new, step, replay)


# The peer -------------------------------------------------------------------------------------------------------------


def start_peer(engine: Engine) -> Any:
    """Returns `transformers`' model over views of the engine's weights."""
    transformers.utils.logging.set_verbosity_error()
    config = engine.runner.config
    fields = config.to_hf("bfloat16")
    hf = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16, attn_implementation="sdpa")
    held = engine.runner.weight_memory.tensors
    state = {n: t for p in served(config) for n, t in to_hf(p, held[p.name]).items()}
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(hf).to("cuda")  # its table is no parameter
    return model.eval()


def peers(model: Any, work: Work, new: int) -> Timing:
    """Times a row of `transformers`, of which it decodes `new` tokens a sample."""
    new = min(new, work.new)
    length = transformers.GenerationConfig(
        max_new_tokens=new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0
    )
    how = transformers.ContinuousBatchingConfig(return_logprobs=True)
    asked = [list(p) for p in prompts(work) for _ in range(work.samples)]
    done = model.generate_batch(asked, generation_config=length, continuous_batching_config=how, record_timestamps=True)
    outputs = list(done.values())
    if len(outputs) < len(asked) or any(len(o.generated_tokens) != new for o in outputs):
        raise RuntimeError(f"{work.case}: transformers finished {len(outputs)} of {len(asked)} requests")
    begin = min(o.lifespan[0] for o in outputs)  # not its start, nor its warm-up
    first = max(o.timestamps[0] for o in outputs) - begin
    steps = [b - a for o in outputs for a, b in pairwise(o.timestamps) if a - begin >= first]
    step = statistics.median(steps) if steps else 0.0
    return Timing(first + step * (work.new - 1), step)


# The run --------------------------------------------------------------------------------------------------------------


def print_table(results: Sequence[Result], out: Console) -> None:
    """Prints a line for each result beside its target, transformers' figure and the cost of a copy."""
    rows = []
    for r in results:
        ms = r.unit == "ms a step"
        number = (lambda x: f"{x:.2f} ms") if ms else (lambda x: f"{x:,.0f}/s")
        target = f"{'<=' if ms else '>='} {number(r.target)}", "[green]met[/]" if r.met else "[red]not met[/]"
        theirs = "" if r.transformers is None else number(r.transformers)
        ratio = "" if r.ratio is None else f"{r.ratio:.1f}"
        share = "" if r.of_copy is None else f"{r.of_copy:.2f}", "" if r.host_gap is None else f"{r.host_gap:.1%}"
        rows.append((f"{r.case} [dim]{r.unit}[/]", number(r.ours), target, theirs, ratio, *share))
    show(out, ("work",), ("ours", "target", "transformers", "ratio", "of copy", "host gap"), rows)


Say = Callable[[str], None]


def time_peer(engine: Engine, works: Sequence[Work], new: int, patience: float, say: Say) -> dict[str, Timing]:
    """Times `transformers`, by case; begins no row after `patience` seconds, and goes on where a row fails."""
    engine.sleep(1)  # gives the memory of its keys and values back; the peer reads its weights
    torch.cuda.empty_cache()
    model = start_peer(engine)
    timings: dict[str, Timing] = {}
    since = time.perf_counter()
    for work in works:
        if time.perf_counter() - since > patience:
            say(f"{work.case}, transformers: left out after {patience:.0f} s (--peer-seconds)")
            continue
        try:
            timings[work.case] = peers(model, work, new)
        except Exception as error:  # ours is still worth having; the table says what is missing
            say(f"[red]{work.case}, transformers: {type(error).__name__}: {error}")
            continue
        say(f"{work.case}, transformers: {figure(work, timings[work.case]):,.2f} {work.unit}")
    return timings


def compared(config: ModelConfig, work: Work, timing: Timing, peer: Timing | None, copy_tbs: float) -> Result:
    """Puts a row beside its peer and beside a copy of `copy_tbs` TB/s."""
    mine, other = figure(work, timing), figure(work, peer) if peer else None
    ms = work.unit == "ms a step"
    contexts = [work.given + work.new / 2] * work.sequences
    floor = costs.step_bytes(config, contexts, 2) / copy_tbs / 1e12
    return Result(
        work.case,
        work.unit,
        work.target,
        mine,
        other,
        None if other is None else other / mine if ms else mine / other,
        floor / timing.step if ms else None,
        1 - timing.replay / timing.step if timing.replay else None,
    )


def fits(config: ModelConfig, work: Work) -> bool:
    """Says whether the free memory of the card holds the weights, and what a row needs beside them."""
    free, _ = torch.cuda.mem_get_info()
    needed = costs.held_bytes(config, 1, 2) + costs.serving_bytes(config, CHUNK, work.sequences, 1, 2) + 2**30
    return needed + tokens_of(work) * costs.token_bytes(config, 1, 2) < free


def run(model: str, rows: list[str], peer_new: int, peer_seconds: float, path: Path | None, format: Format) -> None:
    """Times the rows of these names and prints them; `peer_new` tokens of each request by `transformers`, none where it
    is 0, or cannot hold the engine's weights: of experts, or in a format."""
    config = replace(known.ON_CARDS[model], max_positions=MOST, format=format)
    out = console()
    begin = time.perf_counter()

    def say(text: str) -> None:
        out.print(f"[dim]{time.perf_counter() - begin:5.0f} s[/] {text}")

    with torch.no_grad():
        limits = ceilings()
        say(", ".join(f"{name} {value:.2f}" for name, value in limits.items()))
        torch.cuda.empty_cache()
        works = []
        for work in works_of(model, rows, format):
            if fits(config, work):
                works.append(work)
            else:
                say(f"{work.case}: left out, it does not fit")
        if not works:
            return
        engine = start_engine(config, works)
        timings: dict[str, Timing] = {}
        for work in works:
            timings[work.case] = ours(engine, work)
            say(f"{work.case}: {figure(work, timings[work.case]):,.2f} {work.unit}")
        beside = peer_new and not config.experts and format == PLAIN
        theirs = time_peer(engine, works, peer_new, peer_seconds, say) if beside else {}
    results = [compared(config, w, timings[w.case], theirs.get(w.case), limits["copy TB/s"]) for w in works]
    where = {**versions(), "transformers": transformers.__version__, "format": format}
    print_table(results, out)
    out.print(", ".join(f"{k} {v}" for k, v in {**where, **limits}.items()))
    write_json(path, {**where, "ceilings": limits, "rows": [{**asdict(r), "met": r.met} for r in results]})
