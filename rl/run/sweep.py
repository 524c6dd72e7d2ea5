"""Says how the runs of a sweep ended: a table of what their folders hold."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from rl.config import RunConfig
from rl.run.files import read_mapping


def sweep_table(configs: Sequence[RunConfig]) -> Table:
    """Makes a table with one row a run, those included that an earlier command finished; a run without a summary is said to
    be unfinished."""
    out = Table(title=f"Sweep of {len(configs)} runs", title_justify="left", box=SIMPLE)
    for name in ("run", "overrides", "accuracy", "weights (SHA-256)", "s"):
        right = name in ("run", "s")
        out.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)  # never cut
    for i, config in enumerate(configs, 1):
        found = read_mapping(Path(config.out_dir) / "summary.json")
        accuracy = [found.get(f"eval_accuracy_{when}") for when in ("before", "after")]
        cells = (
            " -> ".join("?" if v is None else f"{v:.3f}" for v in accuracy) if found else "not finished",
            str(found.get("weights_sha256", ""))[:16],
            f"{found['seconds']:.0f}" if "seconds" in found else "",
        )
        out.add_row(str(i), Path(config.out_dir).name, *cells)
    return out
