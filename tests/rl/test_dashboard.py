"""`python -m rl.dashboard`: the report's panels on wandb, built here and sent to nobody."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from rl.dashboard import main, workspace
from rl.report.curves import curves
from tests.rl.documented import undocumented

ASKED = ["--entity", "someone", "--project", "sums"]


def test_every_curve_of_the_report_is_a_panel() -> None:
    made = workspace("someone", "sums", "samebit")
    view = made._to_model()  # what `save` sends: wandb's own checks are in it
    sections = view.spec.section.panel_bank_config.sections
    drawn = curves()
    assert (view.entity, view.project, len(sections)) == ("someone", "sums", len(drawn))
    for section, rows in zip(sections, drawn.values(), strict=True):
        assert [p.config.chart_title for p in section.panels] == [row["title"] for row in rows]
        found = [p.config.metric_regex or p.config.metrics for p in section.panels]
        patterns = [next((name for name in row["metrics"] if "*" in name), "") for row in rows]
        expected = [p.replace("*", ".*") or list(row["metrics"]) for p, row in zip(patterns, rows, strict=True)]
        assert found == expected
        assert {p.config.x_axis for p in section.panels} == {"step"}
    assert not undocumented(name for rows in drawn.values() for row in rows for name in row["metrics"])


def test_what_wandb_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved: list[Any] = []
    made = SimpleNamespace(save=lambda: saved.append(1), url="https://wandb.example/someone/sums")
    monkeypatch.setattr("rl.dashboard.workspace", lambda *names: made)
    main(ASKED)
    assert saved == [1] and capsys.readouterr().out == "https://wandb.example/someone/sums\n"

    def refuses() -> None:
        raise PermissionError("who\nare you")

    made.save = refuses
    with pytest.raises(SystemExit, match="1"):
        main(ASKED)
    said = capsys.readouterr().err
    assert said.startswith("samebit: error: wandb did not take the workspace (PermissionError: who are you)")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [([], "--entity"), ([*ASKED, "--name", "\N{ROCKET}"], "emoji"), (["--entity", "x", "what"], "what")],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    err = capsys.readouterr().err
    assert said in err.lower() and len(err.splitlines()) == 1


def test_without_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    for name in [n for n in sys.modules if n.startswith("wandb_workspaces.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="2"):
        main(ASKED)
    assert "pip install samebit[dashboard]" in capsys.readouterr().err
