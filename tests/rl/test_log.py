"""What a run leaves: strict JSON lines, an atomic summary, and a wandb run that can fail without failing the run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.compose import check
from rl.errors import UserError
from rl.journal import Journal, Totals
from rl.prepare import prepare
from rl.run.files import strict, write_atomic
from rl.run.log import RunLog
from rl.run.trackers.on_wandb import _logged_in


class Told:
    """A tracker that remembers what it was told."""

    where = "here"

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def step(self, step: int, metrics: dict) -> None:
        self.calls.append(("step", step, metrics))

    def alert(self, title: str, text: str) -> None:
        self.calls.append(("alert", title, text))

    def summarise(self, summary: dict, completions: list) -> None:
        self.calls.append(("summary", summary))

    def close(self, exit_code: int) -> None:
        self.calls.append(("close", exit_code))

    def abandon(self) -> None:
        self.calls.append(("abandon",))


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def lines(path: Path) -> list[dict]:
    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """No wandb credentials, whoever runs the tests, and wandb's own files under tmp_path."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    return monkeypatch


def service_processes() -> list[str]:
    """wandb's processes that this process, or one of its children, started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "wandb-core" in command and f"--pid {os.getpid()} " in f"{command} ":
            found.append(command)
    return found


def test_one_strict_object_a_step_with_the_step_first(tmp_path):
    with RunLog(tmp_path, {}, (), "run") as log:
        log.step(3, {"a": float("nan"), "b": np.float32(0.5), "c": -np.inf, "phase": "grpo", "step": 99})
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 3, "a": None, "b": 0.5, "c": None, "phase": "grpo"}]
        log.step(4, {})
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 4] and next(iter(rows[0])) == "step"


@given(st.lists(st.floats(width=32)))
def test_log_probs_keep_their_bits(values):
    array = np.array(values, np.float32)
    back = json.loads(json.dumps(strict(array), allow_nan=False))
    for before, after in zip(array, back, strict=True):
        if np.isfinite(before):
            assert np.float32(after).tobytes() == before.tobytes()
        else:
            assert after is None


def test_what_cannot_be_logged_is_named():
    with pytest.raises(TypeError, match="cannot log a object"):
        strict({"a": [object()]})


def test_completions_and_summary(tmp_path):
    with RunLog(tmp_path, {}, (), "run") as log:
        log.completions(7, [{"prompt": "ü\n", "completion": "<b>", "reward": 1.0, "logprobs": np.float32([-0.5])}])
        log.finish({"weights_sha256": "ab", "seconds": float("inf")})
    row = {"step": 7, "prompt": "ü\n", "completion": "<b>", "reward": 1.0, "logprobs": [-0.5]}
    assert lines(tmp_path / "completions.jsonl") == [row]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"weights_sha256": "ab", "seconds": None}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["completions.jsonl", "metrics.jsonl", "summary.json"]


def test_a_run_that_fails_leaves_no_summary(tmp_path):
    with pytest.raises(KeyError), RunLog(tmp_path, {}, (), "run") as log:
        log.step(0, {"a": 1})
        raise KeyError
    assert not (tmp_path / "summary.json").exists() and len(lines(tmp_path / "metrics.jsonl")) == 1


def test_a_resumed_run_appends_and_drops_half_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew')
    with RunLog(tmp_path, {}, (), "run") as log:
        log.step(1, {"a": 1})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 0}, {"step": 1, "a": 1}]


def test_atomic_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "f", "new \ud800")
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_none_never_loads_wandb(tmp_path):
    code = (
        "import sys; from pathlib import Path; from rl.run.log import RunLog\n"
        f"with RunLog(Path({str(tmp_path)!r}), {{}}, (), 'x') as log: log.step(0, {{}})\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("logger=none", ()),
        ("logger=tensorboard", ("tensorboard",)),
        ("logger=[wandb,tensorboard]", ("wandb", "tensorboard")),
        ("logger=[]", ()),
    ],
)
def test_loggers_of_a_config(asked, meant):
    assert check([asked])[0].logger == meant


@pytest.mark.parametrize("names", ["csv", "[wandb,csv]", "[wandb,wandb]", "3", "[none,wandb]"])
def test_unknown_loggers(names):
    with pytest.raises(
        UserError, match=r"^logger=.*: must be wandb, tensorboard, trackio, none, or a list of several$"
    ):
        check([f"logger={names}"])


def test_a_logger_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("rl.run.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="logger=trackio: its package is not installed: pip install trackio"):
        prepare(check(["logger=trackio", "dry_run=true", "data.problems=100"])[0])


def test_wandb_offline_leaves_a_run_no_words_and_no_process(tmp_path, nobody, capfd):
    with RunLog(tmp_path, {"seed": 0, "path": tmp_path}, ("wandb",), "run") as log:
        assert Path(log.shown_at["wandb"]).parent == tmp_path / "wandb"
        assert service_processes()
        log.step(0, {"divergence/tokens_nonzero": 0.0, "phase": "grpo", "x": float("nan")})
        log.completions(0, [{"prompt": "1 + 1", "completion": "2", "answer": "2", "reward": 1.0, "tokens": [1]}])
        log.finish({"weights_sha256": "ab"})
    deadline = time.monotonic() + 10
    while service_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not service_processes()
    assert capfd.readouterr() == ("", "")
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"divergence/tokens_nonzero" in content and b"weights_sha256" in content
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/completions*.json")
    assert json.loads(table.read_text())["data"] == [[0, "1 + 1", "2", "2", 1.0]]
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_wandb_that_cannot_start_is_one_line(tmp_path, nobody, capfd):
    nobody.setenv("WANDB_API_KEY", "too-short")
    with RunLog(tmp_path, {}, ("wandb",), "run") as log:
        log.step(0, {"a": 1})
        log.finish({})
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("wandb did not start (") and err.endswith("; logging goes on to metrics.jsonl\n")
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 1}] and (tmp_path / "summary.json").exists()


def test_wandb_that_stops_in_the_middle_is_one_line(tmp_path, capfd):
    class Broken(Told):
        def step(self, step: int, metrics: dict) -> None:
            raise ConnectionError("the service\nis gone")

    with RunLog(tmp_path, {}, (), "run") as log:
        other = Told()
        log._trackers = {"wandb": Broken(), "other": other}
        for step in range(3):
            log.step(step, {})
        assert [call[0] for call in other.calls] == ["step"] * 3
    assert capfd.readouterr().err == (
        "wandb stopped (ConnectionError: the service is gone); logging goes on to metrics.jsonl\n"
    )
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize(
    ("content", "host", "expected"),
    [
        ("machine api.wandb.ai login user password " + "k" * 40, "https://api.wandb.ai", True),
        ("machine api.wandb.ai login user password " + "k" * 40, "https://wandb.example.org", False),
        ("machine github.com login user password x", "https://api.wandb.ai", False),
        ("not a netrc file", "https://api.wandb.ai", False),
        (None, "https://api.wandb.ai", False),
    ],
)
def test_logged_in_reads_netrc(tmp_path, nobody, content, host, expected):
    file = tmp_path / "netrc"
    if content is not None:
        file.write_text(content)
        file.chmod(0o600)
    nobody.setenv("NETRC", str(file))
    assert _logged_in(host) is expected


def test_a_resumed_run_is_the_same_wandb_run(tmp_path, nobody, capfd):
    positions: dict[str, int] | None = None
    for step in range(2):
        with RunLog(tmp_path, {}, ("wandb",), "run", positions) as log:
            log.step(step, {"a": step})
            log.completions(step, [{"prompt": f"{step}", "completion": "", "answer": "", "reward": 0.0}])
            positions = log.positions()
            if step:
                log.finish({})
    with RunLog(tmp_path / "another", {}, ("wandb",), "run"):
        pass
    assert capfd.readouterr() == ("", "")
    first, second = (p.stem.removeprefix("run-") for p in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")))
    (other,) = (p.stem.removeprefix("run-") for p in tmp_path.glob("another/wandb/offline-run-*/run-*.wandb"))
    assert first == second == (tmp_path / "wandb_id").read_text().strip() != other
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/completions*.json")
    assert [row[1] for row in json.loads(table.read_text())["data"]] == ["0", "1"]


METRICS = {"divergence/tokens_compared": 9.0, "divergence/tokens_nonzero": 0.0, "divergence/logprob_abs_diff_max": 0.0}


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_the_first_bit_that_differs_is_an_alert(tmp_path, numerics):
    """Once a run, and not of a contrast run, where bits do differ."""
    told = Told()
    with RunLog(tmp_path, {}) as log:
        log._trackers = {"told": told}
        journal = Journal(log, None, numerics, 10, Totals())  # type: ignore[arg-type]
        for step, differing in ((0, None), (1, 0), (2, 3), (3, 4)):
            apart = {"divergence/tokens_nonzero": differing, "divergence/logprob_abs_diff_max": 1e-7}
            journal.step(step, {"a": 1} if differing is None else METRICS | apart)
    alerts = [call[1:] for call in told.calls if call[0] == "alert"]
    line = "step 2: 3 of 9 log-probs differ in a bit, by 1e-07 at most"
    assert alerts == ([("samebit: sampler and trainer differ", line)] if numerics == "exact" else [])
    assert told.calls[-1] == ("close", 1)


def test_tensorboard_has_every_number(tmp_path, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, {"seed": 3}, ("tensorboard",), "run") as log:
        assert log.shown_at == {"tensorboard": str(tmp_path / "tensorboard")}
        for step in range(3):
            log.step(step, {"reward/mean": step / 4, "phase": "grpo", "divergence/by_gap": {"0": 1}, "x": None})
        log.alert("title", "text")
        log.completions(2, [{"prompt": "1 + 1", "completion": "2", "answer": "2", "reward": 1.0, "tokens": [1]}])
        log.finish({"weights_sha256": "ab"})
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Tags()["scalars"] == ["reward/mean"]
    assert [(e.step, e.value) for e in found.Scalars("reward/mean")] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    texts = " ".join(found.Tags()["tensors"])
    assert all(name in texts for name in ("config", "alert", "summary", "completions"))
    assert capfd.readouterr() == ("", "")


def test_trackio_has_every_number(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="logger=trackio needs its package: pip install samebit[trackio]")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with RunLog(tmp_path, {"seed": 3}, ("trackio",), "run") as log:
        for step in range(2):
            log.step(step, {"reward/mean": step / 4, "phase": "grpo"})
        log.alert("title", "text")
        log.finish({"weights_sha256": "ab", "steps": 2})
    assert trackio.__version__ and list((tmp_path / "trackio").rglob("*.db"))
