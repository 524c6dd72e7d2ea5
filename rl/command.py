"""Runs the command `python -m rl.train [+recipe=NAME] [key=value ...] [-m]`: its arguments, sweeps, and how an error ends."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kernels.host.command import Terminated, fail, interruptible
from rl.align import AlignmentError
from rl.command_line import readable, split
from rl.compose import CONFIGS, check, check_keys, for_hydra, register_recipes, sweep_name, to_run_config
from rl.config import RunConfig
from rl.errors import BAD_INPUT, FinishedError, RunError, UserError
from rl.run.screen import Screen
from rl.run.standing import sweep_table

Train = Callable[[RunConfig, Screen], dict[str, Any]]
"""A whole run; returns its summary."""
Prepare = Callable[[RunConfig, Screen], object]
"""All checks of a run before it starts."""

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # what is wrong with the disk, and not with the code


def main(train: Train, prepare: Prepare) -> None:
    """Does what `sys.argv` asks for. Exit code 0: done. 1: the run had to stop. 2: bad input, nothing started. 130, 143, 129:
    ended by Ctrl-C, SIGTERM, SIGHUP."""
    with interruptible():
        _main(train, prepare)


def _main(train: Train, prepare: Prepare) -> None:
    register_recipes()
    try:
        flags, overrides, shows = split(sys.argv[1:])
        if shows:  # a config, or help: by Hydra
            check_keys(overrides)
            sys.argv[1:] = [readable([a])[0] if a in overrides else a for a in sys.argv[1:]]
            return _by_hydra(train)
        checked = _check_runs(train, prepare, overrides, sweep=not {"-m", "--multirun"}.isdisjoint(flags))
    except BAD_INPUT as error:
        fail(error, 2)
    if checked is None:
        return
    runs, sweep = checked
    sys.argv[1:] = [*flags, *runs]
    try:
        _by_hydra(train, sweep)
    finally:
        if sweep:
            Screen(width=None if sys.stdout.isatty() else 120).print(sweep_table(sweep))


def _check_runs(
    train: Train, prepare: Prepare, overrides: list[str], sweep: bool
) -> tuple[list[str], list[RunConfig]] | None:
    """Returns the overrides for Hydra and the runs of a sweep, once all that they stand for are known to be runs; None where
    nothing is left to run."""
    configs = check(overrides, sweep)
    if len(configs) > 1 and not sweep:
        raise UserError(f"these overrides stand for {len(configs)} runs: add -m to run them one after the other")
    if any(c.dry_run for c in configs):
        for config in configs:  # by Hydra a sweep would leave its folder
            train(config.model_copy(update={"dry_run": True}), Screen())
        return None
    if sweep:
        _check_unfinished(prepare, configs)
    out_dir = Path(configs[0].out_dir)
    return for_hydra(overrides, str(out_dir.parent if sweep else out_dir)), configs if sweep else []


def _check_unfinished(prepare: Prepare, configs: Sequence[RunConfig]) -> None:
    """Prepares every run of a sweep but those that are finished; FinishedError where all are."""
    finished = 0
    for config in configs:
        try:
            prepare(config, Screen())
        except FinishedError:  # the sweep goes on with the others
            finished += 1
            if finished == len(configs):
                raise


def _by_hydra(train: Train, sweep: Sequence[RunConfig] = ()) -> None:
    """Lets Hydra compose what `sys.argv` says, for each run of a sweep anew."""

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
    def one(composed: DictConfig) -> None:
        console, asked = Screen(), composed.out_dir
        with _exit_codes(console, composed, asked):
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                composed = _named(composed, len(sweep), console)
            config = to_run_config(composed)
            if summary := train(config, console):
                _conclude(config, summary, console)

    one()


def _named(composed: DictConfig, of: int, console: Screen) -> DictConfig:
    """Gives a run of a sweep of `of` runs a folder named by its overrides."""
    name = sweep_name(sys.argv[1:], list(HydraConfig.get().overrides.task))
    console.print(f"run {HydraConfig.get().job.num + 1} of {of}: {name}")
    composed.out_dir = str(Path(composed.out_dir) / name)
    return composed


@contextlib.contextmanager
def _exit_codes(console: Screen, composed: DictConfig, asked: str) -> Iterator[None]:
    """Ends the command with one line and an exit code where the run inside fails; a sweep goes on after a run that is
    finished. `asked`: the out_dir that the user named."""
    try:
        yield
    except FinishedError as error:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            fail(error, 2)
        console.print(f"out_dir={composed.out_dir} is finished")
    except BAD_INPUT as error:
        fail(error, 2)
    except (RunError, AlignmentError) as error:
        fail(error, 1)
    except OSError as error:
        if error.errno not in _DISK and not _within(error.filename, composed.out_dir):
            raise
        name = f" ({error.filename})" if error.filename else ""
        hint = "make room and give the same command again" if error.errno in _DISK else "make it writable"
        fail(f"out_dir={composed.out_dir}: a file cannot be written: {error.strerror}{name}: {hint}", 1)
    except (KeyboardInterrupt, Terminated) as error:
        begun = composed.checkpoint.every and (Path(composed.out_dir) / "config.yaml").exists()
        goes_on = f"; with out_dir={asked} the same command goes on" if begun else ""
        if isinstance(error, Terminated):
            fail(f"ended by {error}{goes_on}", error.code)
        fail(f"interrupted{goes_on}", 130)


def _conclude(config: RunConfig, summary: dict[str, Any], console: Screen) -> None:
    """Says what a run ended with."""
    before, after = summary["eval_accuracy_before"], summary["eval_accuracy_after"]
    if before is not None:
        console.print(f"accuracy {before:.3f} -> {after:.3f} in {summary['seconds']:.0f} s")
    console.print(f"{summary['tokens_nonzero']:,} of {summary['tokens_compared']:,} log-probs differ in a bit")
    label = "" if config.numerics == "exact" else f" (numerics={config.numerics}: of this layout alone)"
    console.print(f"weights sha256 {summary['weights_sha256']}{label}")
    console.print(f"report {Path(config.out_dir) / 'report.html'}")


def _within(name: object, folder: str) -> bool:
    return isinstance(name, str) and Path(name).absolute().is_relative_to(Path(folder).absolute())
