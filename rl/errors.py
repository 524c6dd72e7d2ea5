"""What can go wrong for a user, and the exit code it ends with."""

import contextlib
from collections.abc import Iterator

from kernels.cpu import BuildError
from kernels.device import UnsupportedError
from kernels.model import ConfigError
from kernels.tree import TreeError
from rollout.sampling import RequestError
from trainer.batch import BatchError


class UserError(Exception):
    """Says that the input is bad: config, data, checkpoint or request. One line that says what to change; exit code 2."""


class FinishedError(UserError):
    """Says that out_dir holds all of the run already."""


class RunError(Exception):
    """Says why a run had to stop: log-probs that differ, weights that differ, a worker that died. One line; exit code 1."""


class LostError(RunError):
    """Says that a rank stands still, or that it or its node is lost, and where that was."""


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Says in what a rank or a node was lost."""
    try:
        yield
    except LostError as error:
        raise LostError(f"{what}: {error}") from None


class SaveError(RunError):
    """Says that a rank could not write its part of a checkpoint or of the model."""


BAD_INPUT = (UserError, ConfigError, BatchError, RequestError, TreeError, BuildError, UnsupportedError)
