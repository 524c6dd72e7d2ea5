"""`python -m rl.bench_publish [OVERRIDES]`: seconds of a publication and of a sleep, with weights of random bits.

The overrides are those of `rl.train`: model=qwen3_8b device=cuda cluster.placement=split trainer.world_size=1 rollout.tp=1.
The engines are those of a run; in the trainer's place stand processes that hold the float32 masters and nothing else. Every
publication is checked by its fingerprints, as in a run.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from math import prod

import ray
import torch
from rich.console import Console
from rich.table import Table

from kernels.collectives.bucket import Ticket
from kernels.collectives.rendezvous import address_of
from kernels.command import fail, interruptible
from kernels.model import ModelConfig
from kernels.model.reshard import fsdp_rows
from kernels.model.weights import parameters
from kernels.place import Place
from kernels.tree import Shard
from rl.cluster import RolloutFleet, TrainerFleet, rendezvous, session
from rl.cluster.calls import Rank
from rl.cluster.start import rollout_ranks, start
from rl.compose import check
from rl.errors import BAD_INPUT, RunError
from rl.model import model_config
from rl.placement import place
from rl.publish import HALF, publish
from trainer.publisher import Publisher, PublishingRank, Receiver

_REPEATS = 3


class Masters(PublishingRank):
    """Rank `rank` of the stand-in for the trainer."""

    def __init__(
        self, rank: int, size: int, store: str, model: ModelConfig, dtype: torch.dtype, device: str, place: Place
    ) -> None:
        if device == "cuda":
            torch.cuda.set_device(place.card)
        generator = torch.Generator(device).manual_seed(rank)
        self.rows = {
            p.name: torch.randn(
                len(fsdp_rows(p.shape[0], rank, size)), *p.shape[1:], device=device, generator=generator
            )
            for p in parameters(model)
        }
        self.publisher = Publisher(model, rank, size, dtype, device, store)

    def start(self) -> int:
        """Nothing is left to do; returns the id of this process."""
        return os.getpid()

    def begin_publication(self, name: str, receivers: Sequence[Receiver], half: int) -> tuple[Ticket, int]:
        return self.publisher.begin(name, self.rows, receivers, half)


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    console = Console(highlight=False)
    try:
        _measure([*sys.argv[1:], "out_dir=unused"], console)
    except BAD_INPUT as error:
        fail(error, 2)
    except RunError as error:
        fail(error, 1)


def _measure(overrides: list[str], console: Console) -> None:
    config = check(overrides)[0]
    model = model_config(config, None if config.model.path or config.model.hf.get("vocab_size") else 64)
    placement = place(config, torch.cuda.device_count() if config.device == "cuda" else 0)
    stores = rendezvous(config.cluster.port, config.rollout.replicas + 1)
    with session(config.cluster, len(placement.trainer) + len(placement.rollout)):
        actor = ray.remote(num_cpus=0, max_restarts=0)(Masters)
        what = (len(placement.trainer), address_of(stores[0]), model, config.dtype, config.device)
        masters = [
            Rank(f"trainer rank {r}", actor.remote(r, *what, where)) for r, where in enumerate(placement.trainer)
        ]
        engines = rollout_ranks(config, model, placement, stores)
        start([*masters, *(rank for engine in engines for rank in engine)], config.cluster.timeout)
        trainer, rollout = TrainerFleet(masters), RolloutFleet(engines, model, placement.rollout)
        size = sum(
            prod(p.part(Shard(0, config.rollout.tp)).shape) * config.dtype.itemsize for p in parameters(model)
        ) * len(placement.rollout)
        table = Table(
            title=f"{model.parameter_count:,} parameters as {config.dtype}, {', '.join(map(str, placement.trainer))} to "
            f"{', '.join(map(str, placement.rollout))}, buckets of 2 x {HALF >> 20} MiB",
            title_justify="left",
        )
        for column in ("", "seconds, median", "least", "most", "GB/s"):
            table.add_column(column)
        version = iter(range(1000))

        def row(name: str, work: Callable[[], object], before: Callable[[], object], moved: int) -> None:
            seconds = []
            for _ in range(_REPEATS):
                before()
                begin = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - begin)
            median = statistics.median(seconds)
            shown = (median, min(seconds), max(seconds))
            table.add_row(name, *(f"{s:.3f}" for s in shown), f"{moved / median / 1e9:.1f}" if moved else "")

        publish(trainer, rollout, next(version))  # opens and compiles what there is
        nothing = lambda: None  # noqa: E731
        row("beside the weights that are served", lambda: publish(trainer, rollout, next(version)), nothing, size)
        asleep = lambda: rollout.sleep(2)  # noqa: E731
        row("into an engine asleep", lambda: publish(trainer, rollout, next(version)), asleep, size)
        rollout.wake()
        row("sleep, level 1", lambda: rollout.sleep(1), rollout.wake, 0)
        rollout.wake()
        row("sleep, level 2", lambda: rollout.sleep(2), rollout.wake, 0)
        row("wake, from level 2", rollout.wake, asleep, 0)
        console.print(table)
        trainer.kill()
        rollout.kill()


if __name__ == "__main__":
    with interruptible():
        main()
