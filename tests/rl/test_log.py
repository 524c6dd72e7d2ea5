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

from rl.run.files import strict, write_atomic
from rl.run.log import RunLog, _logged_in


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
    with RunLog(tmp_path, {}, "none", "run") as log:
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
    with RunLog(tmp_path, {}, "none", "run") as log:
        log.completions(7, [{"prompt": "ü\n", "completion": "<b>", "reward": 1.0, "logprobs": np.float32([-0.5])}])
        log.finish({"weights_sha256": "ab", "seconds": float("inf")})
    row = {"step": 7, "prompt": "ü\n", "completion": "<b>", "reward": 1.0, "logprobs": [-0.5]}
    assert lines(tmp_path / "completions.jsonl") == [row]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"weights_sha256": "ab", "seconds": None}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["completions.jsonl", "metrics.jsonl", "summary.json"]


def test_a_run_that_fails_leaves_no_summary(tmp_path):
    with pytest.raises(KeyError), RunLog(tmp_path, {}, "none", "run") as log:
        log.step(0, {"a": 1})
        raise KeyError
    assert not (tmp_path / "summary.json").exists() and len(lines(tmp_path / "metrics.jsonl")) == 1


def test_a_resumed_run_appends_and_drops_half_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew')
    with RunLog(tmp_path, {}, "none", "run") as log:
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
        f"with RunLog(Path({str(tmp_path)!r}), {{}}, 'none', 'x') as log: log.step(0, {{}})\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_logger(tmp_path):
    with pytest.raises(ValueError, match="logger=csv: must be wandb or none"):
        RunLog(tmp_path, {}, "csv", "run")


def test_wandb_offline_leaves_a_run_no_words_and_no_process(tmp_path, nobody, capfd):
    with RunLog(tmp_path, {"seed": 0, "path": tmp_path}, "wandb", "run") as log:
        assert Path(log.wandb_at).parent == tmp_path / "wandb"
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
    with RunLog(tmp_path, {}, "wandb", "run") as log:
        log.step(0, {"a": 1})
        log.finish({})
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("wandb did not start (") and err.endswith("; logging goes on to metrics.jsonl\n")
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 0, "a": 1}] and (tmp_path / "summary.json").exists()


def test_wandb_that_stops_in_the_middle_is_one_line(tmp_path, capfd):
    class Broken:
        def log(self, _: dict) -> None:
            raise ConnectionError("the service\nis gone")

    with RunLog(tmp_path, {}, "none", "run") as log:
        log._wandb = Broken()
        for step in range(3):
            log.step(step, {})
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
        with RunLog(tmp_path, {}, "wandb", "run", positions) as log:
            log.step(step, {"a": step})
            log.completions(step, [{"prompt": f"{step}", "completion": "", "answer": "", "reward": 0.0}])
            positions = log.positions()
            if step:
                log.finish({})
    with RunLog(tmp_path / "another", {}, "wandb", "run"):
        pass
    assert capfd.readouterr() == ("", "")
    first, second = (p.stem.removeprefix("run-") for p in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")))
    (other,) = (p.stem.removeprefix("run-") for p in tmp_path.glob("another/wandb/offline-run-*/run-*.wandb"))
    assert first == second == (tmp_path / "wandb_id").read_text().strip() != other
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/completions*.json")
    assert [row[1] for row in json.loads(table.read_text())["data"]] == ["0", "1"]
