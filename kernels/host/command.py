"""What the commands share: bad input is one line and exit code 2, and long work shows how far it is."""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.progress import track

from kernels.device import UnsupportedError, choose_device
from kernels.gpu.card import chosen_family
from kernels.host.failures import shortage

Row = TypeVar("Row")

MOST_THREADS = 512
"""Of one process. The system ends a process that asks for many more in a way that no message explains."""


def report(error: object) -> None:
    """Prints an error in one line, whose spaces (of a path, say) stay."""
    print("samebit: error:", " ".join(str(error).splitlines()), file=sys.stderr)


def warn(text: str) -> None:
    """Prints a warning on stderr, at once."""
    print("samebit: warning:", " ".join(text.splitlines()), file=sys.stderr, flush=True)


def fail(error: object, code: int) -> NoReturn:
    """Writes the error as one line and exits with `code`."""
    report(error)
    sys.exit(code)


class Terminated(BaseException):
    """Says that a signal asks this process to end: SIGTERM, or SIGHUP of a terminal that was closed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number
        """The exit code, as a shell has it."""

    def __str__(self) -> str:
        return signal.Signals(self.args[0]).name


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raises Terminated where a signal asks for the end, as Ctrl-C raises KeyboardInterrupt: what was started is ended on the
    way out. A second signal does not disturb that. Who ignores SIGHUP (nohup) goes on doing so."""

    def end(number: int, frame: object) -> None:
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    asked = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {n: signal.getsignal(n) for n in asked if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ends with one line, and no traceback, where Ctrl-C or a signal asks for the end, or memory is short."""
    try:
        with terminable():
            yield
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Terminated as error:
        fail(f"ended by {error}", error.code)
    except (MemoryError, RuntimeError, OSError) as error:
        if short := shortage(error):
            fail(f"{short}; ask for less, or end what else uses that memory", 1)
        raise


def count(text: str) -> int:
    """Reads a positive integer, for `type=`."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def threads(text: str) -> int:
    """Parses a number of threads from an argument: a positive integer of at most MOST_THREADS."""
    if count(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text} is above {MOST_THREADS}")
    return int(text)


def output(text: str) -> Path:
    """Returns the path of a file that can be written; refuses any other before the work, not after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {'is a folder' if path.is_dir() else 'no such folder'}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: not writable")
    return path


def write_json(path: Path | None, value: Any) -> None:
    """Writes what was measured or found to the file that `--json` names; nothing where it names none."""
    if path:
        path.write_text(json.dumps(value, indent=1) + "\n")


class Parser(argparse.ArgumentParser):
    """Parses arguments as argparse does, but says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Writes the message as one line, without the usage, and exits with 2."""
        fail(message, 2)

    def add_family(self) -> None:
        """Adds --family, of the kernels that a GPU runs; the default is what this process was told already, or auto."""
        meaning = (
            "of the kernels that a GPU runs: auto, the card's own; portable, plain Triton, of every card since 8.0"
        )
        self.add_argument("--family", choices=("auto", "portable"), default=chosen_family(), help=meaning)

    def require(self, device: str, family: str = "auto") -> None:
        """Refuses --device cuda where no card can run the kernels, and a family of them on a CPU; this process then runs those
        of the family."""
        try:
            choose_device(device, lambda _: None, family)
        except UnsupportedError as error:
            self.error(f"--device {device}: {error}")


def progress(rows: Sequence[Row]) -> Iterable[Row]:
    """Yields `rows`, with a bar on a terminal while they are measured."""
    console = Console(stderr=True)
    return track(rows, "measuring", console=console, transient=True, disable=not console.is_terminal)
