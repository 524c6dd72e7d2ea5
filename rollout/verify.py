"""`python -m rollout.verify [--mode MODE] [--trials N] [--model DIR] [--json FILE]`: is it really the same to the bit?

single       one prompt in batches of 1 to N
mixed        prompts of different lengths together, N batches at random
prefix       prompts that share prefixes of different lengths, N batches at random
radix_cache  prefill from cached pages against prefill that computes everything
tp           1, 2, 4 and 8 processes, as far as the model's key-value heads go
trainer      what was recorded while sampling against what the trainer computes for the same text
all          every one of them

Prompt log-probs are compared as well. The trainer is not imported: `python -m trainer.score` runs in a process of its own, over
float32 masters under FSDP2, and files are all that the two share. Exit code 1 where a bit differs, with the place and both bit
patterns (or where there is no verdict: a process ended); 2 for a bad argument.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kernels.device import choose_device
from kernels.gpu.card import chosen_family
from kernels.host.command import Parser, count, interruptible, output, report, threads, warn
from kernels.host.failures import shortage
from kernels.model import costs
from kernels.packages import check_packages
from kernels.scratch import scratch
from kernels.weights.beside import name_of
from kernels.weights.files import save
from rollout.arguments import ArgumentError
from rollout.differences import Answer, Row, compare
from rollout.engine import Engine, EngineConfig
from rollout.keys import Device, Dtype, Format, Leaves, Threads, range_of
from rollout.lockstep import Lockstep, RankError
from rollout.runner import RunnerError
from rollout.sampling import Completion, Request, SamplingParams
from rollout.scheduler import Limits
from rollout.serve import BAD_INPUT
from rollout.source import Source

MODES = ("single", "mixed", "prefix", "radix_cache", "tp", "trainer")
_LENGTHS = (1, 17, 64, 150)  # of prompts: one token, past a page, a block of keys, past two blocks


class Verification:
    """Runs engines over one model, and the requests that are put to them."""

    def __init__(self, source: Source, trials: int, new: int, threads: int, device: str) -> None:
        self.source, self.trials, self.new, self.threads, self.device = source, trials, new, threads, device
        longest = source.config.max_positions - new
        self.lengths = sorted({min(length, longest) for length in _LENGTHS})
        self.random = random.Random(0)
        self.text = [self.random.randrange(source.config.vocab_size) for _ in range(max(self.lengths))]

    def config(self, cache: bool, running: int = 32) -> EngineConfig:
        """Makes the engine's config: small chunks, so that prompts are cut, and `running` sequences at once."""
        limits, gpu = Limits(running, 512, 48), self.device == "cuda"
        return EngineConfig(400, 16, cache, limits, self.source.dtype, self.device, cuda_graphs=gpu, overlap=gpu)

    def engine(self, cache: bool = True) -> Engine:
        """Starts an engine in this process with the model's weights."""
        torch.set_num_threads(self.threads)
        engine = Engine(self.source.config, self.config(cache))
        engine.load(self.source.weights(), 0)
        return engine

    def request(self, prompt: Sequence[int], seed: int = 42, temperature: float = 1.0, scored: bool = True) -> Request:
        """Makes a request with the verification's number of new tokens, whose prompt is `scored` too."""
        return Request(0, tuple(prompt), SamplingParams(self.new, temperature, seed), 1 if scored else None)

    def prompts(self) -> list[list[int]]:
        """Draws prompts of different lengths, no two with a common start."""
        vocab = self.source.config.vocab_size
        return [[(t + 7 * i) % vocab for t in self.text[:length]] for i, length in enumerate(self.lengths)]

    # Each mode yields None once for every unit of its work, and its rows.

    def single(self) -> Iterator[Row | None]:
        """Compares one prompt in batches of 1 to `trials`."""
        engine, answers = self.engine(), []
        request = self.request(self.text[:17])
        for size in range(1, self.trials + 1):
            answers += [Answer.of(c) for c in served(engine, [request] * size)]
            yield None
        names = [f"batch of {size}" for size in range(1, self.trials + 1) for _ in range(size)]
        yield compare("single", f"batches of 1 to {self.trials}", answers, names)

    def mixed(self) -> Iterator[Row | None]:
        """Compares prompts of different lengths in batches drawn at random."""
        yield from self._together("mixed", [self.request(p) for p in self.prompts()])

    def prefix(self) -> Iterator[Row | None]:
        """Compares prompts that share prefixes, in batches drawn at random."""
        yield from self._together("prefix", [self.request(self.text[:length], scored=False) for length in self.lengths])

    def _together(self, mode: str, requests: list[Request]) -> Iterator[Row | None]:
        """The first answer of each request is that of an engine that holds nothing else."""
        answers = [[Answer.of(served(self.engine(cache=False), [r])[0])] for r in requests]
        names = [["alone"] for _ in requests]
        engine = self.engine()
        for trial in range(self.trials):
            batch = [i for i in range(len(requests)) for _ in range(self.random.randint(1, 4))]
            self.random.shuffle(batch)
            for i, completion in zip(batch, served(engine, [requests[i] for i in batch]), strict=True):
                answers[i].append(Answer.of(completion))
                names[i].append(f"batch {trial} of {len(batch)}")
            yield None
        for request, found, where in zip(requests, answers, names, strict=True):
            yield compare(mode, f"prompt of {len(request.prompt_ids)} tokens", found, where)

    def radix_cache(self) -> Iterator[Row | None]:
        """Compares three runs of each prompt: the first computes, the second finds the pages, a third computes again without
        a cache."""
        for length in [n for n in self.lengths if n > 16]:
            engine, plain, rows, hits = self.engine(), self.engine(cache=False), [], []
            for trial in range(self.trials):
                request = self.request(self.text[:length], seed=trial, scored=False)
                engine.pool.clear()
                runs = [served(engine, [request])[0], served(engine, [request])[0], served(plain, [request])[0]]
                hits.append(runs[1].cached_tokens)
                names = ["computed", "from cache", "no cache"]
                rows.append(compare("radix_cache", "", [Answer.of(c) for c in runs], names))
                yield None
            worst = next((r for r in rows if not r.holds), rows[0])
            hollow = "" if min(hits) > 0 else "nothing came from the cache"
            case = f"{min(hits)} of {length} tokens from cache"
            bits = sum(r.differing_bits for r in rows)
            yield replace(worst, case=case, samples=3 * self.trials, differing_bits=bits, hollow=hollow)

    def requests(self) -> list[Request]:
        """Makes `trials` of them, of all lengths, several temperatures and filters."""
        temperatures, prompts = (1.0, 0.7, 1.3, 0.0), self.prompts()
        filters: tuple[dict[str, Any], ...] = ({}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.95}, {"min_p": 0.1})
        asked = [
            self.request(prompts[i % len(prompts)], seed=i, temperature=temperatures[i // len(prompts) % 4])
            for i in range(self.trials)
        ]
        return [
            replace(r, sampling=replace(r.sampling, **filters[(i + i // len(prompts)) % 4]))
            for i, r in enumerate(asked)
        ]

    def sizes(self) -> list[int]:
        """Returns the tensor-parallel sizes, of 1, 2, 4 and 8, that the model can be cut into."""
        config = self.source.config
        return [size for size in (1, 2, 4, 8) if config.leaves % size == 0 and config.kv_heads % size == 0]

    def tp(self) -> Iterator[Row | None]:
        """Compares every tensor-parallel size with one process."""
        found: dict[int, list[Answer]] = {}
        requests = [replace(r, id=i) for i, r in enumerate(self.requests())]
        sizes = self.sizes()
        for size in sizes:
            threads = max(1, min(self.threads, (os.cpu_count() or 1) // size))
            with Lockstep(self.source, self.config(cache=True), size, threads) as ranks:
                found[size] = [Answer.of(c) for c in ranks.generate(requests)]
            yield None
        hollow = "" if len(sizes) > 1 else "the key-value heads of this model cannot be cut"
        for size in sizes[1:] or sizes:
            pairs = list(zip(found[1], found[size], strict=True))
            rows = [compare("tp", "", pair, ["tp=1", f"tp={size}"]) for pair in pairs]
            worst = next((r for r in rows if not r.holds), rows[0])
            where = f"request {rows.index(worst)}: {worst.first_difference}" if worst.first_difference else ""
            bits = sum(r.differing_bits for r in rows)
            case = f"tp={size} against tp=1"
            yield replace(
                worst, case=case, samples=2 * len(rows), differing_bits=bits, first_difference=where, hollow=hollow
            )

    def trainer(self) -> Iterator[Row | None]:
        """Compares the sampler's log-probs with those that the trainer computes for the same texts."""
        requests = self.requests()
        completions = served(self.engine(), requests)
        yield None
        values = self.trained(requests, completions)
        yield None
        rows = []
        for completion in completions:
            sampler = Answer.of(completion)
            taken, values = values[: len(sampler.logprobs)], values[len(sampler.logprobs) :]
            trainer = Answer(completion.token_ids, tuple(taken))
            rows.append(compare("trainer", "", [sampler, trainer], ["sampler", "trainer"]))
        worst = next((r for r in rows if not r.holds), rows[0])
        where = f"request {rows.index(worst)}: {worst.first_difference}" if worst.first_difference else ""
        tokens = sum(len(c.token_ids) + len(c.prompt_logprobs) for c in completions)
        bits = sum(r.differing_bits for r in rows)
        case = f"{tokens} log-probs of {len(rows)} texts"
        yield replace(worst, case=case, samples=2 * len(rows), differing_bits=bits, first_difference=where)

    def trained(self, requests: Sequence[Request], completions: Sequence[Completion]) -> list[float]:
        """Returns what the trainer's own process says of these texts."""
        texts = [r.prompt_ids + c.token_ids for r, c in zip(requests, completions, strict=True)]
        asked = [r.sampling for r in requests]
        with scratch() as folder:
            directory = self.source.directory
            if directory is None:
                directory = str(folder / "model")
                save(self.source.config, self.source.weights(), directory)  # type: ignore[arg-type]  # random, and plain
            batch, out = folder / "batch.npz", folder / "out.npy"
            np.savez(
                batch,
                token_ids=np.concatenate(texts),
                lengths=np.array([len(t) for t in texts]),
                prompts=np.array([len(r.prompt_ids) for r in requests]),
                temperatures=np.array([p.scale for p in asked]),
                top_k=np.array([p.filters[0] for p in asked]),
                top_p=np.array([p.filters[1] for p in asked]),
                min_p=np.array([p.filters[2] for p in asked]),
            )
            dtype = name_of(self.source.dtype)
            options = [f"--leaves={self.source.config.leaves}", f"--dtype={dtype}", f"--device={self.device}"]
            options.append(f"--format={self.source.config.format}")
            options += [f"--threads={self.threads}", f"--family={chosen_family()}"]
            if self.source.adapter:
                options.append(f"--adapter={self.source.adapter}")
            command = [sys.executable, "-m", "trainer.score", directory, str(batch), str(out), *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise VerifyError(
                    f"trainer.score failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
                )
            return [float(v) for v in np.load(out)]

    def units(self, mode: str) -> int:
        """Counts how often a mode says None."""
        cached = len([n for n in self.lengths if n > 16])
        return {"radix_cache": cached * self.trials, "tp": len(self.sizes()), "trainer": 2}.get(mode, self.trials)


class VerifyError(RuntimeError):
    """Says why there is no verdict."""


def served(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Generates completions of the requests, numbered in their order."""
    return engine.generate([replace(request, id=i) for i, request in enumerate(requests)])


def run(verification: Verification, modes: Sequence[str], console: Console) -> list[Row]:
    """Runs the modes with a progress bar, prints each row and returns all."""
    rows: list[Row] = []
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        for mode in modes:
            task = progress.add_task(mode, total=verification.units(mode))
            for row in getattr(verification, mode)():
                if row is None:
                    progress.advance(task)
                else:
                    rows.append(row)
                    progress.print(row.line(), soft_wrap=True, markup=False, highlight=False)
            progress.remove_task(task)
    return rows


@dataclass(frozen=True)
class Arguments:
    """Holds the command's arguments."""

    mode: str
    trials: int
    model: str | None
    adapter: str | None
    json: Path | None
    new: int
    leaves: int
    dtype: str
    format: str
    device: str
    threads: int
    family: str


def arguments(argv: Sequence[str] | None) -> Arguments:
    """Parses the command's arguments; bad ones exit with 2."""
    parser = Parser(
        prog="python -m rollout.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    parser.add_argument("--mode", choices=[*MODES, "all"], default="all")
    parser.add_argument("--trials", type=count, default=8)
    parser.add_argument("--model", help="a Hugging Face model directory; without it a tiny random model is verified")
    parser.add_argument("--adapter", help="a folder of LoRA adapters of the model (peft), merged into its weights")
    parser.add_argument("--json", type=output, help="write the rows to this file")
    parser.add_argument("--new", type=count, default=16, help="tokens to sample for each request")
    parser.add_argument(
        "--leaves", type=count, default=0, help=f"{range_of(Leaves).meaning}; default: as the model says"
    )
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto")
    parser.add_argument("--format", choices=range_of(Format).choices, default="auto")
    parser.add_argument("--device", choices=get_args(Device), default="auto")
    parser.add_argument("--threads", type=threads, default=min(4, os.cpu_count() or 1), help=range_of(Threads).meaning)
    parser.add_family()
    asked = parser.parse_args(argv)
    return Arguments(**vars(asked))


def main(argv: Sequence[str] | None = None, source: Source | None = None) -> int:
    """Verifies as the arguments say, the model `source` where it is given; returns the exit code."""
    asked = arguments(argv)
    console = Console(highlight=False)
    if asked.mode in ("trainer", "all"):
        check_packages(("trainer",))  # of which a process is started
    try:
        device = choose_device(asked.device, lambda why: console.print(why, soft_wrap=True), asked.family)
        source = source or Source.open(asked.model, asked.leaves, asked.dtype, device, asked.adapter, asked.format)
        for line in source.remarks:
            warn(line)
        if source.config.max_positions <= asked.new:
            raise ArgumentError(f"--new {asked.new} does not fit the model's {source.config.max_positions} positions")
        about = f"{source.name}, {costs.parameter_count(source.config):,} parameters, {source.dtype}, {device}"
        hint = "" if asked.model else " (a tiny random model: --model DIR for another)"
        console.print(f"verifying {about}{hint}", soft_wrap=True)
        verification = Verification(source, asked.trials, asked.new, asked.threads, device)
        rows = run(verification, MODES if asked.mode == "all" else [asked.mode], console)
    except (VerifyError, RankError, RunnerError) as error:
        report(error)
        return 1
    except (*BAD_INPUT, OSError, MemoryError, RuntimeError) as error:
        if short := shortage(error):
            report(f"{short}; lower --trials or --new, or end what else uses that memory: no verdict")
            return 1
        if not isinstance(error, (*BAD_INPUT, OSError)):
            raise
        report(error)
        return 2
    if asked.json:
        asked.json.write_text(json.dumps({"model": source.name, "rows": [r.json() for r in rows]}, indent=2) + "\n")
    held = sum(row.holds for row in rows)
    console.print(f"{held} of {len(rows)} hold" + ("" if held == len(rows) else ": NOT the same bits"))
    return 0 if held == len(rows) else 1


if __name__ == "__main__":
    with interruptible():
        sys.exit(main())
