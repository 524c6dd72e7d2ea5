"""Writes what a run leaves behind while it runs: metrics.jsonl, completions.jsonl, summary.json, and a wandb run beside them.

The files are the record; wandb is a view of it. Nothing that wandb does or fails to do decides a result, so a failure
there is one line on stderr and the run goes on.
"""

import json
import netrc
import os
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from rl.metrics import Badness
from rl.report.folder import badness, lines
from rl.run.files import strict, write_atomic

TABLE_ROWS = 256
"""Completions in the wandb table: the last ones of the run."""
TABLE_COLUMNS = ("step", "prompt", "completion", "answer", "reward")
RUN_ID = "wandb_id"
"""The file of out_dir that says which wandb run this is: a run that goes on there goes on in it, online and offline."""


class RunLog:
    """Keeps the log of one run in `out_dir`. Rows are appended: a resumed run continues the files it finds.

    Use it as a context manager, or call `finish` (the run is done) or `close` (it is not) yourself.
    """

    def __init__(
        self,
        out_dir: Path,
        config: Mapping[str, Any],
        logger: Literal["wandb", "none"],
        name: str | None = None,
        positions: Mapping[str, int] | None = None,
    ) -> None:
        """`positions`: bytes of each file that this run goes on from; the rest of it is cut off."""
        if logger not in ("wandb", "none"):
            raise ValueError(f"logger={logger}: must be wandb or none")
        self.out_dir = Path(out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        ends = positions or {}
        self._metrics, self._completions = self._files = [
            _open_lines(self.out_dir / name, ends.get(name)) for name in ("metrics.jsonl", "completions.jsonl")
        ]
        self._table: deque[list[Any]] = deque(maxlen=TABLE_ROWS)
        self.worst: Badness | None = None
        """Of the completions so far (rl.metrics.worst): one that is worse is to be logged as it happens."""
        for row in lines(self.out_dir / "completions.jsonl") if ends.get("completions.jsonl") else ():
            self._remember(row)
        self._wandb: Any = None
        self.wandb_at: str | None = None
        """Where the wandb run is: its URL, or its folder when offline; None without wandb."""
        if logger == "wandb":
            self._to_wandb("did not start", lambda: self._start_wandb(strict(config), name))

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends {"step": step, **metrics} as one line of strict JSON: NaN and ±inf become null."""
        self._write(self._metrics, {"step": step} | {k: v for k, v in metrics.items() if k != "step"})
        if self._wandb is not None:
            shown = {
                k: v for k, v in metrics.items() if not k.startswith("divergence/by_")
            }  # no curve: counts by class
            self._to_wandb("stopped", lambda: self._wandb.log({**shown, "step": step}))

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends sampled completions, one {"step": step, **row} a line.

        The report reads prompt, completion, answer, reward, and for the token view tokens (ids or texts), logprobs
        (rollout) and trainer_logprobs, all [T] over the response, and optionally token_texts [T] beside ids.
        """
        for row in rows:
            row = {"step": step} | {k: v for k, v in row.items() if k != "step"}
            self._write(self._completions, row)
            self._remember(row)

    def positions(self) -> dict[str, int]:
        """Returns the bytes of each file so far, all of them on the disk."""
        for file in self._files:
            os.fsync(file.fileno())
        return {Path(file.name).name: os.fstat(file.fileno()).st_size for file in self._files}

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json whole or not at all, ends the wandb run, closes the files."""
        write_atomic(self.out_dir / "summary.json", json.dumps(strict(summary), indent=2, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._to_wandb("stopped", lambda: self._summarise_wandb(strict(summary)))
        self.close(exit_code=0)

    def close(self, exit_code: int = 1) -> None:
        """Closes the files and ends wandb with its service process; `exit_code` 1 marks the wandb run as failed."""
        self._metrics.close()
        self._completions.close()
        if self._wandb is not None:
            self._to_wandb("did not end cleanly", lambda: _stop_wandb(self._wandb, exit_code))
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()  # after finish() there is nothing left to do

    def _remember(self, row: Mapping[str, Any]) -> None:
        self._table.append([strict(row.get(column)) for column in TABLE_COLUMNS])
        if (found := badness(row)) is not None and (self.worst is None or found > self.worst):
            self.worst = found

    def _write(self, file: Any, row: Mapping[str, Any]) -> None:
        file.write(json.dumps(strict(row), allow_nan=False) + "\n")
        file.flush()

    # wandb ------------------------------------------------------------------------------------------------------------

    def _to_wandb(self, event: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # wandb raises many kinds; none may end a training run
            self._wandb = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"wandb {event} ({reason[:300]}); logging goes on to metrics.jsonl", file=sys.stderr, flush=True)
            _teardown_wandb(1)

    def _start_wandb(self, config: dict[str, Any], name: str | None) -> None:
        import wandb  # here, so that logger=none neither needs nor loads it

        quiet = wandb.Settings(silent=True, console="off", init_timeout=30)  # seconds
        if hasattr(wandb.Settings, "finish_timeout") or "finish_timeout" in getattr(wandb.Settings, "model_fields", ()):
            quiet.finish_timeout, quiet.finish_timeout_raises = 120, True  # no network at the end must not hang a run
        settings = wandb.setup(settings=quiet).settings
        mode: Any = os.environ.get("WANDB_MODE")  # offline or disabled is the user's word; online needs credentials
        if mode not in ("offline", "disabled"):
            mode = "online" if settings.api_key or _logged_in(settings.base_url) else "offline"
        self._wandb = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "samebit"),
            name=name,
            id=_run_id(self.out_dir / RUN_ID),
            resume="allow",  # offline, `wandb sync` joins the files of one id
            dir=str(self.out_dir),
            mode=mode,
            config=config,
            settings=quiet,
        )
        self._wandb.define_metric("step")
        self._wandb.define_metric("*", step_metric="step")
        self.wandb_at = self._wandb.url or str(Path(self._wandb.dir).parent)

    def _summarise_wandb(self, summary: dict[str, Any]) -> None:
        import wandb

        if self._table:
            self._wandb.log({"completions": wandb.Table(columns=list(TABLE_COLUMNS), data=list(self._table))})
        self._wandb.summary.update(summary)


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


def _stop_wandb(run: Any, exit_code: int) -> None:
    run.finish(exit_code=exit_code)
    _teardown_wandb(exit_code)


def _teardown_wandb(exit_code: int) -> None:
    """End the service process, which outlives run.finish()."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and hasattr(wandb, "teardown"):
        try:
            wandb.teardown(exit_code=exit_code)
        except Exception:  # the service is already gone, and _to_wandb has said so
            return


# files ----------------------------------------------------------------------------------------------------------------


def _open_lines(path: Path, end: int | None = None) -> Any:
    """`path` open for appending lines, at `end` where it holds more. A run that was killed may have left half a line at the
    end: it is cut off."""
    if path.exists():
        with open(path, "rb+") as file:
            data = file.read(end)
            file.truncate(data.rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")
