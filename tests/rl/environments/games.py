"""Environments of the tests, good and bad ones. Imported in processes of their own."""

import asyncio
import ctypes
import os
import time
from pathlib import Path
from typing import Any

from rl.environments.games.calculator import Calculator


class Notes:
    """Answers by what it was told so far; takes its time, or waits for a file, where a row says so."""

    def reset(self, name: str, pause: float = 0.0, until: str = "", **row: Any) -> str:
        self.told: list[str] = []
        self._pause, self._until = pause, until
        self._name = name
        return f"{name}:"

    def note(self, text: str) -> str:
        """
        Notes a text.

        Args:
            text: What to note.
        """
        time.sleep(self._pause)
        while self._until and not Path(self._until).exists():
            time.sleep(0.01)
        self.told.append(text)
        return f"{self._name}{len(self.told)}"

    async def wait(self, seconds: float) -> str:
        """
        Waits.

        Args:
            seconds: How long.
        """
        await asyncio.sleep(seconds)
        return "waited"

    def get_reward(self) -> float:
        return float(sum(map(len, self.told)))


class Counted(Calculator):
    """Rewards that the tool was used."""

    def get_reward(self) -> float:
        return float(self.calls)


class Bad(Notes):
    """Does what its row says, at the second note."""

    def reset(self, name: str, does: str = "", **row: Any) -> str:
        self._does = does
        if does == "reset":
            raise RuntimeError("no board")
        return super().reset(name, **row)

    def note(self, text: str) -> str:
        """
        Notes a text.

        Args:
            text: What to note.
        """
        if len(self.told) == 1:
            if self._does == "exit":
                os._exit(3)
            if self._does == "crash":
                ctypes.string_at(0)
            if self._does == "hang":
                time.sleep(1000)
            if self._does == "raise":
                self.told.append("")
                raise ValueError("not that")
            if self._does == "quit":
                raise SystemExit(1)
            if self._does == "clock":
                return str(time.time_ns())
        return super().note(text)

    def get_reward(self) -> float:
        if self._does == "nan":
            return float("nan")
        return super().get_reward()


class Untyped:
    """Has a tool that says nothing of its argument."""

    def reset(self) -> None:
        pass

    def note(self, text):  # type: ignore[no-untyped-def]
        return text


class NoReset:
    """Is no environment."""
