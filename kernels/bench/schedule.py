"""`python -m rollout.bench_scheduler`: what the schedule costs, in Python, without a model; and a soak that counts pages.

decode      a step of so many running requests, each with 512 tokens of prompt and some of text: plan and commit
radix hit   how much more a step costs in which one request comes, whose prompt is in the cache but for its last page
admission   requests in one queue, from the first step to the last token of all of them
soak        short requests through an engine with a model of one layer, some aborted at random, one in ten before its first step
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from kernels.bench.table import console, show
from kernels.host.command import Parser, count, output, progress, write_json
from rollout.engine import Engine, EngineConfig, freeze_heap
from rollout.pages import PagePool
from rollout.sampling import Request, SamplingParams, Top
from rollout.scheduler import Limits, Scheduler
from rollout.source import Source

PAGE = 16
CONTEXT = 512  # tokens of the prompt of a running request
LIMIT_MS = 1.0  # of a radix hit at 1,000 running requests


def scheduler(running: int, tokens: int, cache: bool = True) -> Scheduler:
    """Returns a scheduler with room for so many requests of so many tokens."""
    pool = PagePool(running * (-(-tokens // PAGE) + 1), PAGE, cache)
    return Scheduler(pool, Limits(running, max(8192, running), 8192), 1 << 20)


def step(plan: Scheduler, version: int = 0) -> tuple[float, int]:
    """Returns (seconds, tokens computed) of one step, in which every token sampled is 7."""
    begin = time.perf_counter()
    spans = plan.schedule()
    planned = time.perf_counter()
    sampled: list[tuple[int, float, Top]] = [(7, -1.0, ()) for span in spans if span.samples]
    resumed = time.perf_counter()
    plan.commit(spans, sampled, version)
    return time.perf_counter() - resumed + planned - begin, sum(span.stop - span.start for span in spans)


def filled(running: int, room: int) -> Scheduler:
    """Returns a scheduler of so many requests, all decoding, and `room` for more."""
    plan = scheduler(running + room, 4096 + 2 * CONTEXT)
    generator = random.Random(0)
    for i in range(running):
        prompt = tuple(generator.randrange(1000) for _ in range(CONTEXT))
        plan.add(Request(i, prompt, SamplingParams(CONTEXT)))
    while plan.waiting or any(not s.sampled for s in plan.running):
        step(plan)
    return plan


def decode(running: int, steps: int) -> float:
    """Returns the median milliseconds of a step."""
    plan = filled(running, 0)
    return 1000 * median(step(plan)[0] for _ in range(steps))


def radix_hit(running: int, prompt: int, trials: int) -> float:
    """Returns the median milliseconds that a step takes longer for it, adding the request included."""
    plan = filled(running, 1)
    ids = tuple(i % 997 for i in range(prompt))
    extra = []
    for i in range(trials + 1):
        before = median(step(plan)[0] for _ in range(5))
        hits = plan.pool.hit_tokens
        request = Request(running + i, ids, SamplingParams(1))
        begin = time.perf_counter()
        plan.add(request)
        added = time.perf_counter() - begin
        seconds, _ = step(plan)
        if i:  # the first one filled the cache
            assert plan.pool.hit_tokens - hits == (prompt - 1) // PAGE * PAGE, "the prompt was not in the cache"
            extra.append(added + seconds - before)
        assert len(plan.running) == running
    return 1000 * median(extra)


def admission(count: int) -> tuple[float, int, float]:
    """Returns (seconds, steps, milliseconds of the slowest step) of `count` samples at once, 128 tokens in, 64 out,
    eight a prompt."""
    plan = scheduler(count, 256)
    generator = random.Random(0)
    begin = time.perf_counter()
    for i in range(max(1, count // 8)):
        plan.add(Request(i, tuple(generator.randrange(1000) for _ in range(128)), SamplingParams(64, n=8)))
    times = [time.perf_counter() - begin]
    while not plan.idle:
        times.append(step(plan)[0])
    return sum(times), len(times) - 1, 1000 * max(times[1:])


def soak(count: int, seed: int = 0) -> dict[str, int]:
    """Counts pages that were not free at the end, which must be none, and what the engine did meanwhile."""
    source = Source.open(None)
    source = replace(source, config=replace(source.config, layers=1))
    engine = Engine(source.config, EngineConfig(90, 8, True, Limits(48, 512, 24)), decode=source.decode)
    engine.load(source.weights(), 0)
    generator = random.Random(seed)
    heads = [tuple(generator.randrange(256) for _ in range(40)) for _ in range(12)]
    ends = {"stop": 0, "length": 0, "abort": 0}
    samples = added = steps = 0
    while added < count or not engine.idle:
        while added < count and len(engine.scheduler.in_flight) < 64:
            head = generator.choice(heads)[: generator.randrange(41)]
            prompt = (*head, *(generator.randrange(256) for _ in range(generator.randrange(1, 9))))
            asked = SamplingParams(
                generator.randrange(1, 13),
                generator.choice((0.0, 0.7, 1.0)),
                seed=added,
                stop_ids=(7,) if generator.random() < 0.3 else (),
                stop=("e",) if generator.random() < 0.1 else (),
                n=generator.choice((1, 1, 1, 2, 4)),
                top_p=generator.choice((1.0, 1.0, 0.9)),
            )
            engine.add(Request(added, prompt, asked, 1 if generator.random() < 0.1 else None))
            samples += asked.n
            if generator.random() < 0.1:
                ends["abort"] += len(engine.abort(added))
            added += 1
        if generator.random() < 0.2 and engine.scheduler.in_flight:
            ends["abort"] += len(engine.abort(generator.choice(list(engine.scheduler.in_flight))))
        for completion in engine.step():
            ends[completion.finish_reason] += 1
        steps += 1
        assert engine.pool.available >= 0
    leaked = engine.pool.pages - engine.pool.available
    assert sum(ends.values()) == samples, "a sample never ended"
    return {
        "requests": added,
        "samples": samples,
        "steps": steps,
        **ends,
        "preemptions": engine.scheduler.preemptions,
        "tokens_from_cache": engine.pool.hit_tokens,
        "pages": engine.pool.pages,
        "pages_leaked": leaked,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and the soak; 1 if the soak leaked a page."""
    parser = Parser(
        prog="python -m rollout.bench_scheduler",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--running", type=count, nargs="+", default=[256, 1000, 2000])
    parser.add_argument("--prompt", type=count, default=4096, help="tokens of a prompt that the cache holds")
    parser.add_argument("--steps", type=count, default=60)
    parser.add_argument("--requests", type=int, default=20000, help="of the soak; 0: none")
    parser.add_argument("--json", type=output, help="write the figures to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    freeze_heap()
    out, rows = console(), []
    for running in progress(args.running):
        row = {"running": running, "decode_ms": decode(running, args.steps)}
        row["radix_hit_ms"] = radix_hit(running, args.prompt, max(1, args.steps // 4))
        row["admission_s"], row["admission_steps"], row["admission_slowest_ms"] = admission(running)
        rows.append(row)
    cells = [
        (str(row["running"]), *(f"{row[f'{what}_ms']:.2f}" for what in ("decode", "radix_hit", "admission_slowest")))
        for row in rows
    ]
    heads = ("decode step", f"radix hit, {args.prompt} tokens", "slowest step of admission")
    show(out, ("running",), heads, cells, "the schedule, ms")
    begin = time.perf_counter()
    soaked = soak(args.requests) if args.requests else {}
    if soaked:
        seconds = time.perf_counter() - begin
        out.print(
            ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in soaked.items()), f"{seconds:.0f} s"
        )
    write_json(args.json, {"rows": rows, "soak": soaked})
    return 1 if soaked.get("pages_leaked") else 0
