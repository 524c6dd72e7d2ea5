"""The two fleets of a run: all rollout ranks and all trainer ranks, called as one."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch

from kernels.host.place import Place
from kernels.model import ModelConfig
from kernels.weights.beside import Beside
from kernels.weights.bucket import Ticket
from kernels.weights.cargo import Kind
from kernels.weights.routes import Recipient
from kernels.weights.tensor_file import WrittenFile
from rl.cluster.calls import Calls, gather, settle
from rl.cluster.ray_processes import check_ray
from rl.cluster.shelves import Shelves
from rl.cluster.streams import Streams
from rl.cluster.watch import Rank
from rollout.drafts.speculation import Counts
from rollout.replies import Replies
from rollout.sampling import Completion, Request
from trainer.batch import Batch, Rows, StepReport
from trainer.config import TrainerConfig
from trainer.loss import Loss
from trainer.publisher import Sent

Sends = Literal["auto", "weights", "factors"]
"""What a publication of adapters carries: merged weights; A and B, which the engines merge; or these where they are fewer
bytes and an engine is on another host."""


class _Fleet:
    """Ranks that are called together. A call that fails on one of them raises what `gather` says."""

    def __init__(self, ranks: Sequence[Rank], patience: float) -> None:
        self._ranks, self.patience = ranks, patience

    def _calls(self, ask: Callable[[Any], Any]) -> Calls:
        """`ask`: of an actor, returns the reference of the result."""
        return {ask(rank.actor): rank for rank in self._ranks}

    def _all(self, ask: Callable[[Any], Any]) -> list[Any]:
        return gather(self._calls(ask), patience=self.patience)

    def kill(self) -> None:
        for rank in self._ranks:
            ray.kill(rank.actor)


class RolloutFleet(_Fleet):
    """Drives the engines that share a step's requests. Which one serves a request changes nothing in its completion."""

    def __init__(
        self,
        engines: Sequence[Sequence[Rank]],
        model: ModelConfig,
        places: Sequence[Place],
        patience: float = float("inf"),
    ) -> None:
        """`places` of all ranks, engine by engine. `patience`: seconds that a rank may be stopped, as of `gather`."""
        super().__init__([rank for engine in engines for rank in engine], patience)
        self.engines, self.model = engines, model
        shards = [shard for engine in engines for shard in range(len(engine))]
        self.recipients = [Recipient(r.name, s, p) for r, s, p in zip(self._ranks, shards, places, strict=True)]
        self._counts: Calls = {}
        self.founded = False
        """Whether they keep the frozen weights under the adapters that are trained."""
        self.published: list[list[int]] | None = None
        """What they are to serve: the trainer's fingerprints, [parameter][shard]."""
        self.crossed: dict[tuple[str, str], int] = {}
        """Bytes that the last publication sent over the network, by the two hosts."""
        self.packed = 0
        """Bytes that it put into buckets."""

    def generate(self, requests: Sequence[Request], replies: Replies | None = None) -> list[Completion]:
        """Returns all completions, in the order of the requests, the samples of each side by side. Requests of one prompt stay
        together, for the prefix cache. With `replies` serves also what follows them, of which only the replies hear."""
        done = self._converse(requests, replies) if replies else self._generate(requests)
        self._counts = {engine[0].actor.drafts.remote(): engine[0] for engine in self.engines}
        return done

    def _converse(self, requests: Sequence[Request], replies: Replies) -> list[Completion]:
        Streams(self.engines, self.patience).converse(requests, replies)
        return []

    def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        count = len(self.engines)
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt_ids for r in requests))}
        shares = [[r for r in requests if prompts[r.prompt_ids] % count == i] for i in range(count)]
        calls: Calls = {}
        for engine, share in zip(self.engines, shares, strict=True):
            if share:
                calls |= {rank.actor.generate.remote(share): rank for rank in engine}
        done = {(c.request_id, c.sample): c for part in gather(calls, patience=self.patience) for c in part}
        return [done[r.id, sample] for r in requests for sample in range(r.sampling.n)]

    def sleep(self, level: Literal[1, 2]) -> None:
        """Gives back the memory of keys and values, at level 2 that of the weights too."""
        self._all(lambda rank: rank.sleep.remote(level))

    def wake(self) -> None:
        """Takes it again; the weights of a sleep at level 2 come with the next publication."""
        self._all(lambda rank: rank.wake.remote())

    def peak_bytes(self) -> int:
        """Returns the most memory that the fullest rank had so far."""
        return max(self._all(lambda rank: rank.peak_bytes.remote()), default=0)

    def drafts(self) -> Counts:
        """Returns what has become of drafted tokens by the end of the last `generate`, on the first rank of every engine: the
        others' is the same. Does not wait for one that runs: the engines were asked before it."""
        return reduce(Counts.plus, gather(self._counts, patience=self.patience), Counts())

    # A publication (rl.publish), in the order of its calls.

    def begin_publication(
        self,
        name: str,
        sources: Sequence[tuple[Sequence[Ticket], Sequence[Recipient]]],
        half: int,
        kind: Kind = "weights",
        model: ModelConfig | None = None,
    ) -> dict[str, Ticket]:
        """Begins a publication as `rollout.receiver.Receiver.begin`, on every rank. `sources`: of each, the tickets of whom
        it is served by, and who else is. Returns the tickets of those who pass on what they get, by name."""
        begun = zip(self._ranks, sources, strict=True)
        of_all = (half, kind, model)
        calls = {rank.actor.begin_publication.remote(name, *source, *of_all): rank for rank, source in begun}
        found = zip(self._ranks, gather(calls, patience=self.patience), strict=True)
        return {rank.name: ticket for rank, ticket in found if ticket is not None}

    def follow(self, tickets: Mapping[str, Ticket]) -> None:
        """Opens what others pass on: tickets by the name of who reads."""
        readers = [rank for rank in self._ranks if rank.name in tickets]
        gather({rank.actor.follow.remote(tickets[rank.name]): rank for rank in readers}, patience=self.patience)

    def taking(self, number: int) -> Calls:
        """Begins to copy bucket `number`, on every rank."""
        return self._calls(lambda rank: rank.take.remote(number))

    def keep(self) -> None:
        """Ends a publication of frozen weights: the engines keep them beside what they serve."""
        self._all(lambda rank: rank.keep.remote())

    def received(self) -> list[list[int]]:
        """Returns [rank][parameter]: fingerprints of what was copied."""
        return self._all(lambda rank: rank.received.remote())

    def commit(self, version: int) -> None:
        """Makes the engines serve what they copied."""
        self._all(lambda rank: rank.commit.remote(version))

    def served(self) -> list[list[int]]:
        """Returns [rank][parameter]: fingerprints of what the engines sample from."""
        return self._all(lambda rank: rank.served.remote())

    def withdraw(self) -> None:
        """Leaves the engines without weights."""
        self._all(lambda rank: rank.withdraw.remote())

    def abandon(self) -> None:
        """Makes every engine that lives forget a publication that failed."""
        settle(self._calls(lambda rank: rank.abandon.remote()))


class TrainerFleet(_Fleet):
    """Drives the FSDP2 ranks of the trainer."""

    def __init__(
        self, ranks: Sequence[Rank], places: Sequence[Place], patience: float = float("inf"), replicas: int = 1
    ) -> None:
        """`places` of the ranks. `patience`: seconds that a rank may be stopped, as of `gather`. `replicas`: how many times the
        ranks hold the model, one after another."""
        super().__init__(ranks, patience)
        self.ranks, self.places, self.replicas = ranks, places, replicas
        self.model: ModelConfig | None = None
        """What it trains; with adapters, once it has any."""
        self.dtype = torch.float32
        """Of what it serves."""
        self.sends: Sends = "auto"
        """What a publication of adapters carries."""
        self.shelves: Shelves | None = None
        """Of the nodes' files, where they do not share the run's folder."""

    def step(self, batch: Batch, loss: Loss, lr: float) -> StepReport:
        """Does one optimizer step on all of `batch`, of which each rank takes its part."""
        check_ray()
        shared = ray.put(batch)
        return StepReport.merge(
            self._all(lambda rank: rank.step.remote(shared, loss, lr)), [r.name for r in self.ranks]
        )

    def begin_adapters(self, model: ModelConfig) -> None:
        """Freezes what was trained so far, and trains the adapters of `model` on it, as `TrainerRank.begin_adapters`."""
        self.model = model
        self._all(lambda rank: rank.begin_adapters.remote(model))

    def save_adapter(self, directory: str, base: str) -> None:
        """Writes the adapters in the format of `peft`; `base`: the model directory under them."""
        self._all(lambda rank: rank.save_adapter.remote(directory, base))

    def begin_critic(self, model: ModelConfig, training: TrainerConfig, restored: bool) -> None:
        """Makes a second trainer on the same ranks, of the values, as `TrainerRank.begin_critic`."""
        self._all(lambda rank: rank.begin_critic.remote(model, training, restored))

    def critic_values(self, batch: Batch) -> np.ndarray:
        """Returns what the critic says before each loss row of `batch`: float32 [R]."""
        check_ray()
        shared = ray.put(batch)
        return Rows.merge(self._all(lambda rank: rank.critic_values.remote(shared))).values

    def step_critic(self, batch: Batch, loss: Loss, lr: float) -> StepReport:
        """Does one optimizer step of the critic on all of `batch`."""
        check_ray()
        shared = ray.put(batch)
        return StepReport.merge(self._all(lambda rank: rank.step_critic.remote(shared, loss, lr)))

    def freeze(self, model: ModelConfig, source: str | int) -> str:
        """Takes in a model that is never trained (`trainer.frozen`), from a model directory or a seed; returns the digest of
        its weights."""
        where = str(Path(source).absolute()) if isinstance(source, str) else source
        if self.shelves and isinstance(where, str):
            self.shelves.spread(Path(where))
        return self._all(lambda rank: rank.freeze.remote(model, where))[0]

    def thaw(self) -> None:
        """Lets it go."""
        self._all(lambda rank: rank.thaw.remote())

    def frozen_logprobs(self, batch: Batch) -> np.ndarray:
        """Returns its log-probs of all loss rows of `batch`: float32 [R]."""
        check_ray()
        shared = ray.put(batch)
        return Rows.merge(self._all(lambda rank: rank.frozen_logprobs.remote(shared))).values

    def logprobs(self, batch: Batch) -> np.ndarray:
        """Returns the policy's log-probs of all loss rows of `batch`, by the weights as they are: float32 [R]."""
        check_ray()
        shared = ray.put(batch)
        return Rows.merge(self._all(lambda rank: rank.logprobs.remote(shared))).values

    def remember(self) -> None:
        """Keeps the policy's weights as they are, until the next call."""
        self._all(lambda rank: rank.remember.remote())

    def past_logprobs(self, batch: Batch) -> np.ndarray:
        """Returns, by the weights that were remembered, the log-probs of all loss rows of `batch`: float32 [R]."""
        check_ray()
        shared = ray.put(batch)
        return Rows.merge(self._all(lambda rank: rank.past_logprobs.remote(shared))).values

    def reset_optimizer(self) -> None:
        """Sets the moments to zero."""
        self._all(lambda rank: rank.reset_optimizer.remote())

    def offload(self) -> None:
        """Frees the cards' memory until `onload`: weights and moments wait on the host, and nothing else works."""
        self._all(lambda rank: rank.offload.remote())

    def onload(self) -> None:
        """Moves everything back, as the reverse of `offload`."""
        self._all(lambda rank: rank.onload.remote())

    def digest(self) -> str:
        """Returns `kernels.weights.digest` of the weights as they are served."""
        return self._all(lambda rank: rank.digest.remote())[0]

    def snapshot(self, folder: Path) -> int:
        """Begins to write every shard into `folder`, from the first replica; returns the optimizer's step count."""
        return self._writing(lambda rank: rank.snapshot.remote(str(folder.absolute())))[0]

    def written(self, wait: bool) -> list[WrittenFile] | None:
        """Returns the files of the last snapshot once all are on the disk; None before, unless it is to `wait`. SaveError
        where one cannot be written."""
        files = self._writing(lambda rank: rank.written.remote(wait))
        return None if None in files else files

    def writers_away(self) -> list[str]:
        """Returns of each shard the address of the node that keeps it, "" where that is the driver's folder."""
        hosts = [place.host for place in self.places[: len(self.places) // self.replicas]]
        return [host if self.shelves and host in self.shelves.away else "" for host in hosts]

    def finish_away(self, folder: Path, final: Path, manifest: str) -> None:
        """Gives the shards on nodes that do not share the driver's folder their name. SaveError where one cannot."""
        if self.shelves:
            self.shelves.finish(self.writers_away(), folder, final, manifest)

    def prune_away(self, root: Path, newest: str, keep: int) -> None:
        """Leaves the last `keep` checkpoints there."""
        if self.shelves:
            self.shelves.prune(self.writers_away(), root, newest, keep)

    def _writing(self, ask: Callable[[Any], Any]) -> list[Any]:
        writers = self._ranks[: len(self._ranks) // self.replicas]
        return gather({ask(rank.actor): rank for rank in writers}, patience=self.patience)

    def save(self, directory: str, beside: Beside) -> str:
        """Writes the master weights and what stands beside them as a Hugging Face model directory, if one is named; returns the
        digest of the weights."""
        where = str(Path(directory).absolute()) if directory else ""
        digest = self._all(lambda rank: rank.save.remote(where, beside))[0]
        if where and self.shelves:
            self.shelves.collect(self.places[0].host, Path(where))
        return digest

    # A publication (rl.publish), in the order of its calls.

    def begin_publication(
        self, name: str, served: Sequence[Sequence[Recipient]], shards: int, half: int, kind: Kind = "weights"
    ) -> list[tuple[Ticket, int]]:
        """Begins a publication and returns, of every rank, how to open its bucket and how many buckets there will be. `served`:
        by each replica; `shards`: of an engine."""
        size = len(self._ranks) // self.replicas
        ranks = enumerate(self._ranks)
        of_all = (shards, half, kind)
        calls = {rank.actor.begin_publication.remote(name, served[i // size], *of_all): rank for i, rank in ranks}
        return gather(calls, patience=self.patience)

    def packing(self, number: int) -> Calls:
        """Begins to fill a half with bucket `number`, on every rank."""
        return self._calls(lambda rank: rank.pack.remote(number))

    def sending(self, number: int) -> Calls:
        """Begins to send bucket `number` to the recipients on other cards and hosts, on every rank."""
        return self._calls(lambda rank: rank.send.remote(number))

    def end_publication(self) -> list[Sent]:
        """Returns the fingerprints of what each rank serves, and what it sent to other hosts."""
        return self._all(lambda rank: rank.end_publication.remote())

    def cut(self) -> None:
        """Makes every rank that lives end a publication that failed."""
        settle(self._calls(lambda rank: rank.cut.remote()))
