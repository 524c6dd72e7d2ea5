"""`python -m rl.bench_publish [--json FILE] [OVERRIDES]`: seconds of a publication and of a sleep, with weights of random bits.

The overrides are those of `rl.train`: model=qwen3_8b device=cuda cluster.placement=split trainer.world_size=1 rollout.tp=1.
The engines are those of a run; in the trainer's place stand processes that hold the float32 masters and nothing else. Every
publication is checked by its fingerprints, as in a run.
"""

import argparse
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from math import prod
from pathlib import Path

import ray
import torch

from kernels.bench.table import console, show
from kernels.bench.timer import Call, samples
from kernels.collectives.rendezvous import address_of
from kernels.device import UnsupportedError, choose_device
from kernels.host.command import Parser, fail, output, write_json
from kernels.host.place import Place
from kernels.model import ModelConfig, costs, served
from kernels.tree import Shard
from kernels.weights.bucket import Ticket
from kernels.weights.reshard import fsdp_rows
from kernels.weights.routes import Recipient
from rl.cluster import RolloutFleet, TrainerFleet, session
from rl.cluster.nodes import reserved
from rl.cluster.start import named, open_stores, rollout_ranks, start
from rl.cluster.watch import Rank
from rl.compose import check
from rl.errors import BAD_INPUT, RunError
from rl.model import model_config
from rl.publish import HALF, publish
from trainer.publisher import Publisher, PublishingRank

_REPEATS = 3


class Masters(PublishingRank):
    """Stands for rank `rank` of the trainer."""

    def __init__(
        self, rank: int, places: Sequence[Place], store: str, model: ModelConfig, dtype: torch.dtype, device: str
    ) -> None:
        places[rank].enter()
        size = len(places)
        generator = torch.Generator(device).manual_seed(rank)
        self.rows = {
            p.name: torch.randn(
                len(fsdp_rows(p.shape[0], rank, size)), *p.shape[1:], device=device, generator=generator
            )
            for p in served(model)
        }
        self.publisher = Publisher(model, rank, size, dtype, places[rank], store)

    def start(self) -> int:
        """Returns the id of this process; nothing is left to do."""
        return os.getpid()

    def begin_publication(
        self, name: str, recipients: Sequence[Recipient], shards: int, half: int
    ) -> tuple[Ticket, int]:
        """Begins a publication; returns the ticket that opens this rank's bucket, and how many buckets follow."""
        return self.publisher.begin(name, self.rows, recipients, shards, half)


def main() -> None:
    """Prints the table; bad input ends with one line."""
    parser = Parser(
        prog="python -m rl.bench_publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=output, help="write the rows to this file")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    out = console()
    try:
        (config,) = check([*args.overrides, "out_dir=unused"])
        choose_device(config.device, out.print, config.kernels.family)
        rows, title = measure([*args.overrides, "out_dir=unused"])
    except (*BAD_INPUT, UnsupportedError) as error:
        fail(error, 2)
    except RunError as error:
        fail(error, 1)
    cells = [
        (r.name, *(f"{s:.3f}" for s in (r.median, r.least, r.most)), "" if r.rate is None else f"{r.rate:.1f}")
        for r in rows
    ]
    show(out, ("",), ("seconds, median", "least", "most", "GB/s"), cells, title)
    write_json(args.json, {"rows": [asdict(r) for r in rows]})


@dataclass(frozen=True)
class Row:
    """Holds the seconds of one thing, and where weights move, 10^9 bytes a second."""

    name: str
    median: float
    least: float
    most: float
    rate: float | None


def measure(overrides: list[str]) -> tuple[list[Row], str]:
    """Starts the processes of a run, times publications, sleeps and wakes, and says between what they were."""
    config = check(overrides)[0]
    model = model_config(config, None if config.model.path or config.model.hf.get("vocab_size") else 64)
    processes = config.trainer.world_size + config.rollout.replicas * config.rollout.tp
    with session(config.cluster, processes, Path(config.out_dir) / "train.log"), reserved(config) as where:
        placement, stores = where.placement, open_stores(config)
        actor = ray.remote(num_cpus=0, max_restarts=0)(Masters)
        what = (placement.trainer, address_of(stores[0]), model, config.dtype, config.device)
        masters = [
            Rank(named(f"trainer rank {r}", p), actor.options(**where.options(p.host)).remote(r, *what))
            for r, p in enumerate(placement.trainer)
        ]
        engines = rollout_ranks(config, model, where, stores)
        start([*masters, *(rank for engine in engines for rank in engine)], config.cluster.timeout)
        trainer, rollout = TrainerFleet(masters, placement.trainer), RolloutFleet(engines, model, placement.rollout)
        part = sum(prod(p.part(Shard(0, config.rollout.tp)).shape) * config.dtype.itemsize for p in served(model))
        rows = list(_rows(trainer, rollout, part * len(placement.rollout)))
        trainer.kill()
        rollout.kill()
    title = (
        f"{costs.parameter_count(model):,} parameters as {config.dtype}, {', '.join(map(str, placement.trainer))} to "
        f"{', '.join(map(str, placement.rollout))}, buckets of 2 x {HALF >> 20} MiB"
    )
    return rows, title


def _rows(trainer: TrainerFleet, rollout: RolloutFleet, moved: int) -> Iterator[Row]:
    """Yields the rows. `moved`: bytes that a publication writes."""
    version = count()

    def row(name: str, work: Call, before: Call | None, moved: int) -> Row:
        seconds = samples(work, _REPEATS, before=before)
        median = statistics.median(seconds)
        return Row(name, median, min(seconds), max(seconds), moved / median / 1e9 if moved else None)

    def published() -> None:
        publish(trainer, rollout, next(version))

    asleep = partial(rollout.sleep, 2)
    yield row("beside the weights that are served", published, None, moved)
    yield row("into an engine asleep", published, asleep, moved)
    rollout.wake()
    yield row("sleep, level 1", partial(rollout.sleep, 1), rollout.wake, 0)
    rollout.wake()
    yield row("sleep, level 2", partial(rollout.sleep, 2), rollout.wake, 0)
    yield row("wake, from level 2", rollout.wake, asleep, 0)
