"""The command: `python -m rl.train [+recipe=NAME] [key=value ...] [-m]`."""

import signal
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from rl.compose import CONFIGS, check, register_recipes, sweep_name, to_run_config
from rl.errors import BAD_INPUT, RunError


def main() -> None:
    """Exit code 0: done. 1: the run had to stop. 2: bad input, nothing started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    register_recipes()
    try:
        # Hydra's own flags (--cfg, --help, ...) show configs; everything else must be a config that runs
        if not any(a.startswith("-") and a not in ("-m", "--multirun") for a in sys.argv[1:]):
            check([a for a in sys.argv[1:] if not a.startswith("-")])
    except BAD_INPUT as error:
        _fail(error, 2)
    _hydra_main()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def _hydra_main(composed: DictConfig) -> None:
    console = Console(highlight=False)
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # a sweep's runs each get a folder named by their overrides
            name = sweep_name(sys.argv[1:], list(HydraConfig.get().overrides.task))
            composed = OmegaConf.merge(composed, {"out_dir": str(Path(composed.out_dir) / name)})  # type: ignore[assignment]
        config = to_run_config(composed)
        from rl.loop import run

        summary = run(config, console)
    except BAD_INPUT as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    if summary:
        before, after = summary["eval_accuracy_before"], summary["eval_accuracy_after"]
        console.print(f"accuracy {before:.3f} -> {after:.3f} in {summary['seconds']:.0f} s")
        console.print(f"{summary['tokens_nonzero']} of {summary['tokens_compared']:,} log-probs differ in a bit")
        console.print(f"weights sha256 {summary['weights_sha256']}")
        console.print(f"report {Path(config.out_dir) / 'report.html'}", soft_wrap=True)


def _fail(error: object, code: int) -> None:
    print(f"samebit: error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
