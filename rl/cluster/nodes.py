"""The nodes of a running Ray: what each has, and what of it a run reserves, as a placement group."""

import contextlib
import ipaddress
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from kernels.collectives.rendezvous import AddressError, address_on
from kernels.host.memory import available_memory
from kernels.host.place import HOST
from rl.cluster.ray_processes import session
from rl.config import RunConfig
from rl.errors import RunError, UserError
from rl.placement import Node, Placement, Share, cards_of, choose, place, shares


def available(config: RunConfig) -> list[Node]:
    """Describes what ranks can run on: this machine, or the nodes of the cluster that `cluster.address` names, of which each is
    asked. UserError where one cannot serve, RunError where Ray does not answer in time."""
    if config.cluster.address == "local":
        return [this_node(config.device)]
    log = Path(config.out_dir) / "train.log"
    with contextlib.nullcontext() if ray.is_initialized() else session(config.cluster, 0, log):
        return asked(found(), config)


def another_ray(config: RunConfig) -> str:
    """Warns where this process was told of a running Ray, as in a job of `ray job submit`, and the run starts its own."""
    if config.cluster.address != "local" or not os.environ.get("RAY_ADDRESS"):
        return ""
    return (
        f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} names a running Ray, and cluster.address=local starts another on this "
        f"machine: set cluster.address=auto to use it"
    )


def this_node(device: str) -> Node:
    """Describes the machine of this process, for a run on one host."""
    cards = range(torch.cuda.device_count() if device == "cuda" else 0)
    sizes = tuple(torch.cuda.get_device_properties(i).total_memory for i in cards)
    return Node(HOST, tuple(cards), os.cpu_count() or 1, available_memory(), sizes)


def asked(nodes: Sequence[Node], config: RunConfig) -> list[Node]:
    """Asks each node for its free memory, and whether it has this program and these versions; leaves out what is lost."""

    def look() -> dict[str, Any]:  # by value: a node that lacks the program can be asked too
        import importlib.metadata as metadata
        import importlib.util
        import shutil
        import subprocess

        import psutil

        sizes = ""
        if tool := shutil.which("nvidia-smi"):
            query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
            sizes = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
        return {
            "memory": int(psutil.virtual_memory().available),
            "sizes": [int(x) << 20 for x in sizes.split() if x.isdigit()],
            "program": importlib.util.find_spec("trainer") is not None,
            "torch": metadata.version("torch") if importlib.util.find_spec("torch") else "none",
        }

    by_address = {n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    calls = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(by_address[n.host], soft=False)).remote()
        for n in nodes
    ]
    _, late = ray.wait(calls, num_returns=len(calls), timeout=config.cluster.timeout)
    if late:
        silent = ", ".join(n.host for n, call in zip(nodes, calls, strict=True) if call in late)
        raise RunError(f"node(s) {silent} did not answer within cluster.timeout={config.cluster.timeout:.0f} s")
    answered, lost = [], ""
    for node, call in zip(nodes, calls, strict=True):
        try:
            answer = ray.get(call)
        except RayError as error:  # it died a moment ago, which Ray had not noticed: the others may be enough
            lost = f"node {node.host} was lost: {' '.join(str(error).split())[:300]}"
            continue
        _check_versions(node, answer)
        answered.append(replace(node, memory=answer["memory"], card_bytes=tuple(answer["sizes"][: len(node.cards)])))
    if not answered:
        raise RunError(lost)
    return answered


def _check_versions(node: Node, answer: Mapping[str, Any]) -> None:
    if not answer["program"]:
        raise UserError(
            f"node {node.host} cannot import samebit: install it there too, in the environment that Ray was started in"
        )
    if answer["torch"] != version("torch"):
        raise UserError(
            f"node {node.host} has torch {answer['torch']} and this one {torch.__version__}: install the same"
        )


def found() -> list[Node]:
    """Describes the living nodes of the Ray that this process is connected to, this process's own first."""
    own = ray.get_runtime_context().get_node_id()
    alive = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeID"] != own, n["NodeManagerAddress"]))
    nodes = [_described(n) for n in alive]
    for node in nodes if len(nodes) > 1 else ():
        if ipaddress.ip_address(node.host).is_loopback or [other.host for other in nodes].count(node.host) > 1:
            raise UserError(
                f"a node gave Ray the address {node.host}, at which the others do not reach it: start Ray there with "
                f"--node-ip-address"
            )
    return nodes


def own_address(interface: str | None) -> str:
    """Returns the address at which other nodes reach this process: that of its node, or of one of its network interfaces."""
    if interface is None:
        return found()[0].host
    try:
        return address_on(interface)
    except AddressError as error:
        raise UserError(str(error)) from None


def _described(node: dict[str, Any]) -> Node:
    has = node["Resources"]
    return Node(node["NodeManagerAddress"], tuple(range(int(has.get("GPU", 0)))), int(has.get("CPU", 0)))


@dataclass(frozen=True)
class Reserved:
    """Holds the nodes of a run, and the placement group in which each has one bundle; none where it is one host."""

    placement: Placement
    bundles: dict[str, int]  # of each host
    group: PlacementGroup | None = None
    raylets: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Where Ray listens on each of the other nodes."""

    def options(self, host: str) -> dict[str, Any]:
        """Returns the options of an actor that is to run on `host`."""
        if self.group is None:
            return {}
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.bundles[host])}

    def elsewhere(self, host: str) -> str | None:
        """Returns `host` where it is another node than this process's."""
        return host if host in self.raylets else None


@contextlib.contextmanager
def reserved(config: RunConfig) -> Iterator[Reserved]:
    """Chooses nodes and reserves what the run needs of them, until the way out. UserError where Ray has not enough, or does
    not give it within `cluster.timeout` seconds."""
    if config.cluster.address == "local":
        nodes = choose(config, [this_node(config.device)])
        yield Reserved(place(config, nodes), {})
        return
    nodes = choose(config, found())
    used = [(n, s) for n, s in zip(nodes, shares(config, nodes), strict=True) if s.trainer or s.engines]
    group = placement_group(
        [_bundle(config, node, share) for node, share in used],
        strategy="STRICT_SPREAD" if len(used) > 1 else "STRICT_PACK",
    )
    try:
        if not group.wait(config.cluster.timeout):
            raise UserError(_not_given(config, used))
        given = _given(config, group, [node for node, _ in used])
        bundles = {node.host: i for i, node in enumerate(given)}
        yield Reserved(place(config, given, [share for _, share in used]), bundles, group, _raylets(bundles))
    finally:
        with contextlib.suppress(Exception):  # of a Ray that is lost, which the run's own failure says
            remove_placement_group(group)


def _raylets(hosts: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Where Ray listens on those of the hosts that are not this process's."""
    own = ray.get_runtime_context().get_node_id()
    others = (n for n in ray.nodes() if n["NodeID"] != own and n["NodeManagerAddress"] in set(hosts))
    return {n["NodeManagerAddress"]: (n["NodeManagerAddress"], n["NodeManagerPort"]) for n in others if n["Alive"]}


def _bundle(config: RunConfig, node: Node, share: Share) -> dict[str, float]:
    """What is reserved of a node: whole cards, or cores, which may be fewer than its ranks where they take turns."""
    count = cards_of(config, node, share)
    return {"GPU": count} if config.device == "cuda" else {"CPU": min(count, max(1, node.cpus))}


def _given(config: RunConfig, group: PlacementGroup, asked: Sequence[Node]) -> list[Node]:
    """The nodes that Ray chose for the bundles, with the cards that it reserved there."""
    hosts = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
    chosen = placement_group_table(group)["bundles_to_node_id"]
    nodes = [replace(node, host=hosts[chosen[i]]) for i, node in enumerate(asked)]
    if config.device == "cpu":
        return [replace(node, cards=()) for node in nodes]
    cards = _cards(group, config.cluster.timeout)
    return [replace(node, cards=numbers) for node, numbers in zip(nodes, cards, strict=True)]


def _cards(group: PlacementGroup, timeout: float) -> list[tuple[int, ...]]:
    """The cards of each bundle, as a process of its node numbers them, which sees all that the node gave to Ray."""

    def visible() -> str:
        import os

        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    every = [
        ray.remote(visible).options(num_gpus=0, **_there(group, i)).remote() for i in range(len(group.bundle_specs))
    ]
    names = card_names(group, timeout)
    return [card_numbers(*pair) for pair in zip(names, ray.get(every, timeout=timeout), strict=True)]


def card_names(group: PlacementGroup, timeout: float) -> list[list[str]]:
    """Returns the cards of each bundle, as CUDA_VISIBLE_DEVICES would name them on its node."""

    def names() -> list[str]:
        return [str(name) for name in ray.get_gpu_ids()]

    bundles = enumerate(group.bundle_specs)
    asked = [ray.remote(names).options(num_gpus=bundle["GPU"], **_there(group, i)).remote() for i, bundle in bundles]
    return list(ray.get(asked, timeout=timeout))


def _there(group: PlacementGroup, i: int) -> dict[str, Any]:
    """Options of a task in bundle `i`."""
    return {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, i)}


def card_numbers(names: Sequence[str], visible: str) -> tuple[int, ...]:
    """Numbers cards as a process numbers them whose CUDA_VISIBLE_DEVICES is `visible`, from their names there."""
    order = visible.split(",") if visible else []
    return tuple(sorted(order.index(name) if order else int(name) for name in names))


def _not_given(config: RunConfig, used: Sequence[tuple[Node, Share]]) -> str:
    asked = ", ".join(
        " ".join(f"{count:.0f} {kind}" for kind, count in _bundle(config, *pair).items()) for pair in used
    )
    free = ray.available_resources()
    kind = "GPU" if config.device == "cuda" else "CPU"
    return (
        f"Ray did not reserve {asked} on {len(used)} node(s) within cluster.timeout={config.cluster.timeout:.0f} s: "
        f"{free.get(kind, 0):.0f} of {ray.cluster_resources().get(kind, 0):.0f} {kind} are free; another run may hold them"
    )
