"""`python -m rl.dashboard --entity NAME [--project samebit]`: makes a wandb workspace with the panels of report.html.

It needs `pip install samebit[dashboard]` and a login (`wandb login`). A workspace is a view: it shows every run of the project,
those that come later too. Exit code 1: wandb refused; 2: bad input.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from kernels.host.command import Parser, fail, interruptible
from rl.report.curves import curves

_TITLES = {
    "learning": "Learning",
    "divergence": "Sampler against trainer: 0 in an exact run",
    "speed": "Speed and memory",
}


def main(arguments: Sequence[str]) -> None:
    """Makes the workspace and prints its address."""
    parser = Parser(prog="python -m rl.dashboard", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--entity", required=True, metavar="NAME", help="user or team on wandb")
    parser.add_argument("--project", default="samebit", metavar="NAME", help="default: samebit, as of a run")
    parser.add_argument("--name", default="samebit", metavar="NAME", help="of the workspace")
    asked = parser.parse_args(arguments)
    try:
        made = workspace(asked.entity, asked.project, asked.name)
    except ImportError:
        fail("the package wandb-workspaces is not installed: pip install samebit[dashboard]", 2)
    except ValueError as error:
        fail(error, 2)
    try:
        made.save()
    except Exception as error:  # of the network, of wandb's server, of a login that is missing
        fail(f"wandb did not take the workspace ({type(error).__name__}: {error}); `wandb login` says who you are", 1)
    print(made.url)


def workspace(entity: str, project: str, name: str) -> Any:
    """Builds the workspace, with a section for each part of the report, over the run's own step."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for part, drawn in curves().items():
        panels: list[Any] = []
        for curve in drawn:
            named = [name for name in curve["metrics"] if "*" not in name]
            matched = next((name.replace("*", ".*") for name in curve["metrics"] if "*" in name), None)
            lines = {"title": curve["title"], "title_y": curve["unit"], "y": named, "metric_regex": matched}
            panels.append(reports.LinePlot(x="step", **lines))
        sections.append(workspaces.Section(name=_TITLES[part], panels=panels, is_open=True))
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections)


if __name__ == "__main__":
    with interruptible():
        main(sys.argv[1:])
