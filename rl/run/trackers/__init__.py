"""Trackers: where a run can be watched beside its files. `logger` of the config names them.

tracker.py       what every tracker is
on_wandb.py      wandb: online where the user is logged in, else its files
on_tensorboard.py  TensorBoard: an event file in out_dir/tensorboard
on_trackio.py    Trackio: a local database, no account

To add one: a file with a class that has a tracker's methods, and a line in `TRACKERS`.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rl.errors import UserError
from rl.run.trackers.tracker import TABLE_COLUMNS, Tracker

TRACKERS = {"wandb": "WandbTracker", "tensorboard": "TensorboardTracker", "trackio": "TrackioTracker"}
"""Name, which is also that of its package -> class, in the file on_NAME.py."""


def check_installed(kind: str) -> None:
    """Raises UserError where the package of a tracker is not there."""
    if find_spec(kind) is None:
        raise UserError(f"logger={kind}: its package is not installed: pip install {kind}")


def open_tracker(kind: str, out_dir: Path, config: dict[str, Any], name: str) -> Tracker:
    """Starts a tracker of the run in `out_dir`. What it raises is its own."""
    made: Tracker = getattr(import_module(f"rl.run.trackers.on_{kind}"), TRACKERS[kind])(out_dir, config, name)
    return made
