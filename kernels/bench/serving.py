"""The engine at Qwen3-8B's shapes on one GPU, beside `transformers`' continuous batching over the same weights, in one run.

Work of both: temperature 1, the log-prob of each sampled token, no end of text, random prompts. A decode step is the wall clock
of the steps of a running batch over their number, host included. Beside it stands what copying at the card's measured bandwidth
would take for the bytes a step must read (weights once, keys and values of every sequence once), and the same graph replayed
without a host between, which shows what the host costs.

The peer holds the same weights (views of ours) and runs after our cache is freed. It is far slower on a card without a flash
attention package, so it decodes `--peer-new` tokens of each request: its rate over the whole work is projected from its own
timestamps, first tokens + the median of its steps, which favours it as contexts grow.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

import kernels.bench.card_rows
from kernels.bench.timer import ceilings, versions
from kernels.model import ModelConfig, served
from kernels.weights.files import to_hf
from rollout.engine import Engine, EngineConfig, freeze_heap
from rollout.sampling import Request, SamplingParams
from rollout.scheduler import Limits

QWEN3_8B = replace(kernels.bench.card_rows.QWEN3_8B, max_positions=8192)
PAGE = 16
CHUNK = 16384


@dataclass(frozen=True)
class Work:
    """`prompts` of `given` tokens, `samples` of each, `new` tokens a sample."""

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
        return self.prompts * self.samples


WORK = [
    Work("decode", "decode, batch 1, 128 in, 128 out", 1, 128, 128, unit="ms a step", target=6.9),
    Work("decode", "decode, batch 16", 16, 128, 128, unit="ms a step", target=7.2),
    Work("decode", "decode, batch 64", 64, 128, 128, unit="ms a step", target=8.1),
    Work("decode", "decode, batch 256", 256, 128, 128, unit="ms a step", target=12.8),
    Work("throughput", "256 requests, 512 in, 512 out", 256, 512, 512, target=10100),
    Work("prefix", "32 prompts x 8 samples, 256 in, 512 out", 32, 256, 512, 8, target=16500),
    Work("prefill", "prefill, 16 x 4,000 tokens", 16, 4000, 1, unit="prompt tokens/s", target=38000),
]


@dataclass(frozen=True)
class Timing:
    """Seconds of one work."""

    whole: float
    step: float  # of one decode step
    replay: float | None = None  # of its graph alone


@dataclass(frozen=True)
class Result:
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
        return self.ours <= self.target if self.unit == "ms a step" else self.ours >= self.target


def figure(work: Work, timing: Timing) -> float:
    if work.unit == "ms a step":
        return timing.step * 1e3
    tokens = work.sequences * work.new if work.unit == "output tokens/s" else work.prompts * work.given
    return tokens / timing.whole


def prompts(work: Work) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, QWEN3_8B.vocab_size, (work.prompts, work.given), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def requests(work: Work, new: int) -> list[Request]:
    return [Request(i, p, SamplingParams(new, seed=i, n=work.samples)) for i, p in enumerate(prompts(work))]


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


# Ours -----------------------------------------------------------------------------------------------------------------


def start_engine(config: ModelConfig, works: Sequence[Work]) -> Engine:
    """Weights are drawn on the card: matrices of `init_std`, norms of ones. `Engine.load` would hash 16 GB first."""
    tokens = max(work.sequences * (work.given + work.new + PAGE) for work in works)
    running = max(work.sequences for work in works)
    limits = Limits(running, CHUNK, CHUNK)
    how = EngineConfig(tokens // PAGE, PAGE, True, limits, torch.bfloat16, "cuda", cuda_graphs=True, overlap=True)
    engine = Engine(config, how)
    torch.cuda.manual_seed(0)
    for parameter in served(config):
        held = engine.runner.weights[parameter.name]
        if parameter.columns:
            held.normal_(0, config.init_std)
        else:
            held.fill_(1)
    engine.version = 0
    freeze_heap()
    return engine


def ours(engine: Engine, work: Work) -> Timing:
    """Not counted: what compiles, and what captures graphs."""
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


def step_bytes(config: ModelConfig, work: Work) -> float:
    """Weights but for the embedding, of which a step reads a row a sequence, and the keys and values of a mean context."""
    weights = 2 * (config.parameter_count - config.vocab_size * config.hidden_size)
    row = 2 * 2 * config.layers * config.kv_heads * config.head_dim
    return weights + work.sequences * (work.given + work.new / 2) * row


# The peer -------------------------------------------------------------------------------------------------------------


def start_peer(engine: Engine) -> Any:
    """`transformers`' model over views of the engine's weights."""
    transformers.utils.logging.set_verbosity_error()
    config = engine.runner.config
    fields = config.to_hf("bfloat16")
    hf = transformers.AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf, dtype=torch.bfloat16, attn_implementation="sdpa")
    state = {n: t for p in served(config) for n, t in to_hf(p, engine.runner.weights[p.name]).items()}
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(hf).to("cuda")  # its table is no parameter
    return model.eval()


def peers(model: Any, work: Work, new: int) -> Timing:
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


def table(results: Sequence[Result]) -> Table:
    view = Table(box=box.SIMPLE_HEAD)
    view.add_column("work")
    for column in ("ours", "target", "", "transformers", "ratio", "of copy", "host gap"):
        view.add_column(column, justify="right", no_wrap=True)
    for r in results:
        ms = r.unit == "ms a step"
        number = (lambda x: f"{x:.2f} ms") if ms else (lambda x: f"{x:,.0f}/s")
        view.add_row(
            f"{r.case} [dim]{r.unit}",
            number(r.ours),
            f"{'<=' if ms else '>='} {number(r.target)}",
            "[green]met" if r.met else "[red]not met",
            "" if r.transformers is None else number(r.transformers),
            "" if r.ratio is None else f"{r.ratio:.1f}",
            "" if r.of_copy is None else f"{r.of_copy:.2f}",
            "" if r.host_gap is None else f"{r.host_gap:.1%}",
        )
    return view


def run(args: argparse.Namespace) -> None:
    console = Console()
    begin = time.perf_counter()
    works = [work for work in WORK if work.rows in args.rows]

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - begin:5.0f} s[/] {text}")

    with torch.no_grad():
        limits = ceilings()
        say(", ".join(f"{name} {value:.2f}" for name, value in limits.items()))
        torch.cuda.empty_cache()
        engine = start_engine(QWEN3_8B, works)
        timings: list[tuple[Work, Timing, Timing | None]] = []
        for work in works:
            timing = ours(engine, work)
            timings.append((work, timing, None))
            say(f"{work.case}: {figure(work, timing):,.2f} {work.unit}")
        if args.peer_new:
            engine.sleep(1)  # gives the memory of its keys and values back; the peer reads its weights
            torch.cuda.empty_cache()
            model = start_peer(engine)
            since = time.perf_counter()
            for i, (work, timing, _) in enumerate(timings):
                if time.perf_counter() - since > args.peer_seconds:
                    say(f"{work.case}, transformers: left out after {args.peer_seconds:.0f} s (--peer-seconds)")
                    continue
                try:
                    theirs = peers(model, work, args.peer_new)
                except Exception as error:  # ours is still worth having; the table says what is missing
                    say(f"[red]{work.case}, transformers: {type(error).__name__}: {error}")
                    continue
                timings[i] = work, timing, theirs
                say(f"{work.case}, transformers: {figure(work, theirs):,.2f} {work.unit}")
    results = []
    for work, timing, peer in timings:
        mine, other = figure(work, timing), figure(work, peer) if peer else None
        ms = work.unit == "ms a step"
        floor = step_bytes(QWEN3_8B, work) / limits["copy TB/s"] / 1e12
        results.append(
            Result(
                work.case,
                work.unit,
                work.target,
                mine,
                other,
                None if other is None else other / mine if ms else mine / other,
                floor / timing.step if ms else None,
                1 - timing.replay / timing.step if timing.replay else None,
            )
        )
    where = {**versions(), "transformers": transformers.__version__}
    console.print(table(results), ", ".join(f"{k} {v}" for k, v in {**where, **limits}.items()), sep="\n")
    if args.json:
        rows = [{**asdict(r), "met": r.met} for r in results]
        with open(args.json, "w") as file:
            json.dump({**where, "ceilings": limits, "rows": rows}, file, indent=1)
