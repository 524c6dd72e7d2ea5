"""Runs episodes of an environment of the package `verifiers` in a process of its own, as many at a time as it is asked for.

It is told what to make, says on its pipe how many tasks there are (a text: what is wrong), and then answers parts as their
episodes end. It talks to the policy over HTTP.
"""

import asyncio
import itertools
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from rl.environments.verifiers.host import PLUGINS, Branch, Episode, Part, Scene, Setting
from rl.environments.verifiers.line import NAME
from rl.rewards.claim import raised
from rl.rewards.worker import Wanted, while_the_run_lasts

_AGENT = "samebit_chat"
_KEY = "SAMEBIT_LINE_KEY"  # the environment variable that the client reads the server's key from


def main(handle: int) -> None:
    """Serves over the pipe with file descriptor `handle`: first comes a list of one `Wanted`."""
    while_the_run_lasts(_begin, handle)


def _begin(pipe: Connection) -> None:
    (wanted,) = pipe.recv()
    sys.path.append(str(PLUGINS))
    try:
        environment, tasks = opened(wanted)
    except BaseException as error:  # a module may raise anything: sys.exit is an exception too
        pipe.send(raised(error))
        return
    pipe.send(len(tasks))
    asyncio.run(_serve(pipe, environment, tasks))


def opened(wanted: Wanted) -> tuple[Any, Sequence[Any]]:
    """Makes the environment and its tasks. ValueError where it is none that can be trained in."""
    from verifiers.v1.configs.agent import agent_config_fields
    from verifiers.v1.utils.loaders import default_harness_id, load_environment, resolve_env_config

    setting = Setting(*wanted.args["setting"])
    values = {**setting.args, "taskset": {**setting.args.get("taskset", {}), "id": wanted.function}}
    seats = agent_config_fields(resolve_env_config(values))
    if len(seats) != 1:
        raise ValueError(
            f"it has {len(seats)} agents, {', '.join(seats)}: one conversation a sample is trained on, that of one agent"
        )
    (seat,) = seats
    agent = dict(setting.args.get(seat, {}))
    if "harness" not in agent and default_harness_id(wanted.function) == "bash":
        agent["harness"] = {"id": _AGENT}
    stages = dict.fromkeys(("setup", "finalize", "scoring"), setting.timeout)
    agent = {"runtime": {"type": "subprocess"}, "max_turns": setting.max_turns, **agent}
    agent["timeout"] = {**stages, **agent.get("timeout", {})}
    environment = load_environment(resolve_env_config({**values, seat: agent}))
    tasks = list(itertools.islice(iter(environment.taskset), setting.tasks))
    if not tasks:
        raise ValueError("it has no tasks")
    return environment, tasks


async def _serve(pipe: Connection, environment: Any, tasks: Sequence[Any]) -> None:
    """Answers parts until the pipe is closed; a number in the place of parts ends the one that has it."""
    here, inbox = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def read() -> None:
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = None
            here.call_soon_threadsafe(inbox.put_nowait, message)
            if message is None:
                return

    threading.Thread(target=read, daemon=True).start()
    running: dict[int, asyncio.Task[None]] = {}
    async with environment.serving():
        while True:
            message = await inbox.get()
            if message is None:
                for task in running.values():
                    task.cancel()
                await asyncio.gather(*running.values(), return_exceptions=True)
                return
            if isinstance(message, int):
                if message in running:
                    running.pop(message).cancel()
                continue
            scene = Scene(*message[0])
            os.environ[_KEY] = scene.key
            for part in (Part(*one) for one in message[1]):
                play = asyncio.create_task(_answer(pipe, environment, tasks[part.task], scene, part))
                running[part.number] = play
                play.add_done_callback(partial(_forget, running, part.number))


def _forget(running: dict[int, asyncio.Task[None]], number: int, play: asyncio.Task[None]) -> None:
    if running.get(number) is play:
        del running[number]


async def _answer(pipe: Connection, environment: Any, task: Any, scene: Scene, part: Part) -> None:
    try:
        (slot,) = environment.slots(task, 1)
        episode = told(await environment.run_slot(slot, _context(scene, part.sampling)))
    except Exception as error:
        episode = Episode(error=f"raised {raised(error)}")
    pipe.send((part.number, episode))


def _context(scene: Scene, sampling: Mapping[str, Any]) -> Any:
    from renderers.configs import CustomRendererConfig
    from verifiers.v1.clients import ModelContext
    from verifiers.v1.configs.client import TrainClientConfig
    from verifiers.v1.types import SamplingConfig

    renderer = CustomRendererConfig(
        import_path="rl.environments.verifiers.renderer.Renderer",
        folder=scene.folder,
        template=scene.template,
        arguments=dict(scene.arguments),
        format=scene.format,
    )
    client = TrainClientConfig(
        base_url=scene.url, api_key_var=_KEY, renderer=renderer, renderer_model_name=scene.folder
    )
    return ModelContext(NAME, client, SamplingConfig(**sampling))


def told(episode: Any) -> Episode:
    """Says what an episode came to, in plain data."""
    from verifiers.v1.dialects.chat import message_to_wire

    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if not episode.ok or len(episode.traces) != 1:
        said = f"{errors[-1].type}: {errors[-1].message}" if errors else f"came to {len(episode.traces)} conversations"
        return Episode(error=f"failed: {' '.join(said.split())[:300]}")
    (trace,) = episode.traces
    branches = tuple(Branch(b.token_ids, b.sampled_mask, b.logprobs) for b in trace.branches)
    nodes = trace.branches[-1].nodes if trace.branches else []
    first = next((i for i, node in enumerate(nodes) if node.sampled), len(nodes))
    return Episode(
        reward=float(trace.reward),
        metrics={str(name): float(value) for name, value in trace.metrics.items() if value is not None},
        branches=branches,
        messages=tuple(message_to_wire(node.message) for node in nodes[first:]),
        cut=bool(trace.is_truncated),
    )
