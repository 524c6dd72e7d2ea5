"""Keeps the process that has the environment, and hears of its episodes."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rl.environments.worker import About
from rl.errors import UserError
from rl.rewards.process import JudgeError, Process
from rl.rewards.worker import Wanted

_PATIENCE = 60.0  # seconds before it is said that something is still under way


class Setting(NamedTuple):
    """Says how the environment is made."""

    args: Mapping[str, Any]  # of its config, as the package reads them
    tasks: int  # how many of its tasks are wanted at the most
    max_turns: int
    timeout: float  # seconds of one stage that is not sampling


class Scene(NamedTuple):
    """Says where the policy is, and how it is talked to."""

    url: str
    key: str  # of the server
    folder: str  # that has the tokenizer
    template: str  # of the chat
    arguments: Mapping[str, Any]  # of the template
    format: str  # of tool calls


class Part(NamedTuple):
    """Asks for one episode."""

    number: int  # by which it is told of
    task: int
    sampling: Mapping[str, Any]  # in the client's words


class Branch(NamedTuple):
    """Holds one conversation as the package recorded it."""

    token_ids: list[int]
    sampled: list[bool]
    logprobs: list[float]


class Episode(NamedTuple):
    """Says what an episode came to."""

    error: str = ""  # why it is left out, as the end of "the environment ..."
    reward: float | None = None
    metrics: Mapping[str, float] = {}
    branches: tuple[Branch, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()  # of the last branch
    cut: bool = False  # a limit ended it


class VerifiersHost:
    """Asks one process for episodes, each of which runs beside the others."""

    def __init__(self, factory: str, setting: Setting) -> None:
        """Imports the environment: UserError where that fails."""
        self._wanted = Wanted(factory, {"setting": tuple(setting)})
        self._process: Process | None = None
        self.tasks = int(self._start())
        self.about = About(factory, [], rewards=True, teaches=False)

    def _start(self) -> Any:
        """Starts the process; returns how many tasks there are."""
        self._process = Process([self._wanted], "rl.environments.verifiers.worker")
        begun = told = time.monotonic()
        while not self._process.pipe.poll(1.0) and not self._process.has_ended:
            if (now := time.monotonic()) - told > _PATIENCE:
                told = now
                print(f"still waiting for the import of {self._wanted.function} ({now - begun:.0f} s)", flush=True)
        try:
            said = self._process.receive()
        except JudgeError as error:
            said = f"its import {error}"
        if isinstance(said, str):
            self.close()
            raise UserError(f"environment.factory={self._wanted.function!r}: {said}")
        return said

    def play(self, scene: Scene, parts: list[Part]) -> None:
        """Begins episodes; starts the process again where it was lost. Where it ends at this moment, `heard` says so."""
        if self._process and self._process.has_ended:
            self.close()
        if self._process is None:
            self._start()
        self._tell((tuple(scene), [tuple(part) for part in parts]))

    def cancel(self, number: int) -> None:
        """Ends an episode, of which nothing more is heard."""
        self._tell(number)

    def _tell(self, message: Any) -> None:
        if self._process:
            with contextlib.suppress(JudgeError):
                self._process.tell(message)

    def heard(self, patience: float) -> list[tuple[int, Episode]]:
        """Returns the episodes that have ended, waiting up to `patience` seconds for the first. JudgeError where the process
        has ended, and with it all that are under way."""
        assert self._process
        out: list[tuple[int, Episode]] = []
        try:
            while self._process.pipe.poll(0.0 if out else patience):
                out.append(self._process.receive())
            if not out and self._process.has_ended:
                raise JudgeError(self._process.how_it_ended())
        except JudgeError:
            self.close()
            raise
        return out

    def close(self) -> None:
        """Ends the process."""
        if self._process:
            self._process.kill()
        self._process = None


def check_installed() -> None:
    """Raises UserError where the package is not there, or of another version."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("verifiers")
    except PackageNotFoundError:
        raise UserError("environment.name=verifiers: pip install 'samebit[verifiers]' first") from None
    if found.split(".")[:2] != ["0", "4"]:
        raise UserError(f"environment.name=verifiers: version 0.4 of the package is needed, {found} is installed")


PLUGINS = Path(__file__).with_name("plugins")
