"""Shows a run on wandb: online where the user is logged in, else in files for `wandb sync`."""

import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from rl.run.files import write_atomic
from rl.run.trackers.tracker import TABLE_COLUMNS

RUN_ID = "wandb_id"
"""The file of out_dir that says which wandb run this is: a run that goes on there goes on in it, online and offline."""


class WandbTracker:
    """Shows a run on wandb. WANDB_MODE, WANDB_PROJECT and wandb's other variables are the user's."""

    def __init__(self, out_dir: Path, config: dict[str, Any], name: str) -> None:
        try:
            self._run = _start(out_dir, config, name)
        except Exception:
            _teardown(1)
            raise

    @property
    def where(self) -> str:
        """Returns the run's URL, or its folder when offline."""
        return self._run.url or str(Path(self._run.dir).parent)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs the metrics over the run's own step."""
        self._run.log({**metrics, "step": step})

    def alert(self, title: str, text: str) -> None:
        """Makes wandb mail the user, or write to their Slack, as they chose there."""
        self._run.alert(title=title, text=text, level="ERROR")

    def summarise(self, summary: Mapping[str, Any], completions: Sequence[Sequence[Any]]) -> None:
        """Adds the summary and a table of completions."""
        if completions:
            table = wandb.Table(columns=list(TABLE_COLUMNS), data=[list(row) for row in completions])
            self._run.log({"completions": table})
        self._run.summary.update(dict(summary))

    def close(self, exit_code: int) -> None:
        """Ends the run and wandb's service process."""
        self._run.finish(exit_code=exit_code)
        _teardown(exit_code)

    def abandon(self) -> None:
        """Ends the service process."""
        _teardown(1)


def _start(out_dir: Path, config: dict[str, Any], name: str) -> Any:
    quiet = wandb.Settings(silent=True, console="off", init_timeout=30)  # seconds
    if hasattr(wandb.Settings, "finish_timeout") or "finish_timeout" in getattr(wandb.Settings, "model_fields", ()):
        quiet.finish_timeout, quiet.finish_timeout_raises = 120, True  # no network at the end must not hang a run
    settings = wandb.setup(settings=quiet).settings
    mode: Any = os.environ.get("WANDB_MODE")  # offline or disabled is the user's word; online needs credentials
    if mode not in ("offline", "disabled"):
        mode = "online" if settings.api_key or _logged_in(settings.base_url) else "offline"
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "samebit"),
        name=name,
        id=_run_id(out_dir / RUN_ID),
        resume="allow",  # offline, `wandb sync` joins the files of one id
        dir=str(out_dir),
        mode=mode,
        config=config,
        settings=quiet,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _logged_in(base_url: str) -> bool:
    """True if wandb would find credentials for `base_url` in the environment or in netrc. Asks nobody."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]
    host = urlsplit(base_url).netloc
    hosts = [host, "api.wandb.ai"] if host.endswith("coreweave.com") else [host]  # one service under two names
    for file in files:
        try:
            entries = netrc.netrc(file.expanduser())
        except (OSError, netrc.NetrcParseError):
            continue
        return any(entries.hosts.get(host, ("", "", ""))[2] for host in hosts)
    return False


def _run_id(file: Path) -> str:
    """The id in `file`, which is written where there is none."""
    if not file.exists():
        write_atomic(file, uuid.uuid4().hex[:8] + "\n")
    return file.read_text().strip()


def _teardown(exit_code: int) -> None:
    """Ends the service process, which outlives run.finish()."""
    if hasattr(wandb, "teardown"):
        try:
            wandb.teardown(exit_code=exit_code)
        except Exception:  # the service is already gone, and who called has said so
            return
