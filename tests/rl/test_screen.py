"""What a run says: in a file and in a terminal, in train.log, before it begins and after a sweep."""

import io
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.compose import check
from rl.config import RunConfig
from rl.journal import Compared, Journal, Totals
from rl.loop import told as of_a_step
from rl.metrics import worst
from rl.prepare import prepare
from rl.run import screen as told
from rl.run.banner import banner
from rl.run.log import RunLog
from rl.run.screen import Bar, Screen, Waiting
from rl.run.standing import sweep_table
from rl.samples import Group, Sample
from rl.train import publish_aloud
from tests.rl.command import call
from tests.trainer.batches import suffix_rows
from trainer.batch import Batch

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


def piped(width: int = 80, **more: Any) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(file=out, width=width, **more), out


def noted(path: Path) -> list[str]:
    """The lines of a log file without their times."""
    lines = path.read_text("utf-8").splitlines()
    assert all(re.match(TIME, line) for line in lines), lines
    return [re.sub(TIME, "", line, count=1) for line in lines]


def eventually(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Whose `now` is what screen.py takes for the time."""
    now = SimpleNamespace(now=0.0)
    monkeypatch.setattr(told, "time", SimpleNamespace(monotonic=lambda: now.now))
    return now


# the log file ---------------------------------------------------------------------------------------------------------

LINES = ("samebit", "x" * 300, "[red]no markup[/red] [/]", "π and \ud800 of a prompt")


def test_the_log_holds_every_line_with_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen, out = piped()
    screen.print(LINES[0])
    screen.warn("careful")
    with screen.keep(tmp_path / "train.log"):
        assert not (tmp_path / "train.log").exists()  # nothing was said since
        for line in LINES[1:3]:
            screen.print(line)
        screen.note(LINES[3])
    screen.print("after")
    assert out.getvalue().splitlines() == [*LINES[:3], "after"]
    assert "careful" in capsys.readouterr().err
    *most, odd, after = noted(tmp_path / "train.log")
    assert most == [LINES[0], "warning: careful", *LINES[1:3]] and after == "after" and odd.startswith("π and ")


def test_a_log_is_gone_on_with_and_says_why_a_run_stopped(tmp_path: Path) -> None:
    for i in range(2):
        screen, _ = piped()
        with pytest.raises(KeyError), screen.keep(tmp_path / "train.log"):
            screen.print(f"run {i}")
            raise KeyError("a\n  b")
    stopped = r"stopped by KeyError: 'a\n b'"
    assert noted(tmp_path / "train.log") == ["run 0", stopped, "run 1", stopped]


def test_lines_of_several_threads_are_each_there_once(tmp_path: Path) -> None:
    screen, _ = piped()
    with screen.keep(tmp_path / "train.log"):
        threads = [threading.Thread(target=lambda i=i: [screen.note(f"{i} {j}") for j in range(200)]) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(noted(tmp_path / "train.log")) == sorted(f"{i} {j}" for i in range(4) for j in range(200))


# steps and phases -----------------------------------------------------------------------------------------------------


def test_a_line_a_step_where_nobody_watches(tmp_path: Path, clock: SimpleNamespace) -> None:
    """As many in a pipe as in the log; the time left is counted from the first step done here."""
    screen, out = piped()
    with screen.keep(tmp_path / "train.log"), Bar(screen, "GRPO") as bar:
        for step in (11, 12):
            clock.now += 2
            bar(step, 20, f"reward 0.{step}")
    lines = ["GRPO 11/20  reward 0.11  eta 0:00:18", "GRPO 12/20  reward 0.12  eta 0:00:16"]
    assert out.getvalue().splitlines() == lines == noted(tmp_path / "train.log")


def test_a_terminal_has_a_bar_and_the_log_its_lines(tmp_path: Path) -> None:
    screen, out = piped(100, force_terminal=True, force_interactive=True)
    with screen.keep(tmp_path / "train.log"), Bar(screen, "GRPO") as bar:
        for step in (1, 2, 3):
            with bar.phase("sampling"):
                pass
            bar(step, 3, f"reward 0.{step}")
            screen.print(f"said beside step {step}")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert all(text in shown for text in ("3/3", "sampling", "reward 0.3", "said beside step 2"))
    found = noted(tmp_path / "train.log")
    assert [line.partition("  eta ")[0] for line in found[::2]] == [f"GRPO {i}/3  reward 0.{i}" for i in (1, 2, 3)]
    assert found[1::2] == [f"said beside step {i}" for i in (1, 2, 3)]


def test_what_takes_long_says_so_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "FIRST", 0.02)
    monkeypatch.setattr(told, "NEXT", 0.02)
    screen, out = piped()
    with Waiting(screen, "publishing, by buckets", total=12) as waiting:
        waiting.done = 3
        eventually(lambda: out.getvalue().count("publishing, by buckets (3 of 12, 0 s)\n") > 1)
        waiting.done = waiting.total = 0
        waiting.what = "comparing"
        eventually(lambda: "comparing (" in out.getvalue())
    with Bar(screen, "GRPO") as bar, bar.phase("training"):
        eventually(lambda: "GRPO: training (" in out.getvalue())


def test_what_is_short_says_nothing() -> None:
    screen, out = piped()
    with Waiting(screen, "a"), Bar(screen, "GRPO") as bar, bar.phase("training"), Waiting(None, "b"):
        pass
    assert not out.getvalue()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_stops_no_one_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line after it is an error of the run's own, on one line."""
    monkeypatch.setattr(told, "FIRST", 0.01)
    monkeypatch.setattr(told, "NEXT", 0.01)
    tried: list[str] = []

    def full(line: str) -> None:
        tried.append(line)
        raise OSError(28, "No space left on device")

    screen, _ = piped()
    monkeypatch.setattr(screen, "note", full)
    with Waiting(screen, "training"):
        eventually(lambda: len(tried) > 1)
    with pytest.raises(OSError, match="No space"):
        screen.print("next")


def test_a_publication_of_one_bucket_does_not_stand_at_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "FIRST", 0.02)
    monkeypatch.setattr(told, "NEXT", 0.02)
    screen, out = piped()

    def slow(progress: Callable[[int, int], None]) -> None:
        progress(0, 1)
        eventually(lambda: "version 7, by buckets (0 of 1, 0 s)\n" in out.getvalue())
        progress(1, 1)
        eventually(lambda: "comparing what was sent and received" in out.getvalue())

    publish_aloud(screen, 7, slow)


METRICS = {"reward/mean": 0.5, "speed/step_tokens_per_s": 12345.6}


@pytest.mark.parametrize(("differing", "gap", "said"), [(0, 0.0, "0"), (1234, 0.00119, "0.0012 (1,234 tokens differ)")])
def test_a_step_says_its_reward_accuracy_speed_and_gap(differing: int, gap: float, said: str) -> None:
    row = METRICS | {"divergence/tokens_nonzero": float(differing), "divergence/logprob_abs_diff_max": gap}
    assert of_a_step(row, 0.25) == f"reward 0.500  accuracy 0.250  12,346 tokens/s  gap {said}"


# what a run is --------------------------------------------------------------------------------------------------------


def test_the_banner_says_what_is_about_to_run() -> None:
    (config,) = check(["logger=none", "data.problems=100", "steps=5", "out_dir=here", "seed=3", "numerics=fast"])
    ready = prepare(config.model_copy(update={"dry_run": True}))
    lines = banner(config, ready.model, ready.source, ready.judged_by, ready.plan)
    assert all("\n" not in line and line.strip() for line in lines)
    rows = dict(line.split("  ", 1) for line in (re.sub(r" {2,}", "  ", line) for line in lines))
    head = next(iter(rows))
    assert head.startswith("samebit") and rows[head] == "fast numerics, seed 3"
    assert list(rows)[1:] == ["model", "data", "algorithm", "steps", "layout", "device", "out_dir"]
    assert f"{ready.plan.parameters:,} parameters" in rows["model"] and "random weights" in rows["model"]
    assert f"{len(ready.source.train):,} problems to train on" in rows["data"] and ready.judged_by in rows["data"]
    assert rows["algorithm"] == "grpo, token mean, clip 0.2 / 0.28, 1 update(s) a step"
    assert f"{config.warmup.steps} supervised, 5 GRPO" in rows["steps"]
    assert rows["device"].startswith("cpu") and rows["out_dir"].startswith("here: train.log")


# a sweep --------------------------------------------------------------------------------------------------------------


def left(folder: Path, **summary: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))


def test_a_sweep_says_which_run_begins_and_ends_in_a_table(tmp_path: Path) -> None:
    def run(config: RunConfig, screen: Screen) -> dict[str, Any]:
        values = {"eval_accuracy_before": 0.5, "eval_accuracy_after": 0.75, "seconds": 61.0}
        values |= {"weights_sha256": f"{config.seed}" * 64, "tokens_compared": 9000, "tokens_nonzero": 0}
        left(Path(config.out_dir), **values)
        screen.print(f"seed {config.seed} runs")
        return values

    outcome = call("-m", "logger=none", "data.problems=100", "steps=5", "seed=0,1", f"out_dir={tmp_path}/s", train=run)
    assert outcome.code == 0 and not outcome.err, outcome
    said = [outcome.out.index(f"run {i + 1} of 2: seed={i}\nseed {i} runs\n") for i in (0, 1)]
    table = outcome.out[outcome.out.index("Sweep of 2 runs") :]
    assert said == sorted(said) and outcome.out.index("Sweep of 2 runs") > said[1]
    for i in (0, 1):
        assert re.search(rf"{i + 1}\s+seed={i}\s+0.500 -> 0.750\s+{str(i) * 16}\s+61", table), table


def test_the_table_of_a_sweep_that_stopped_cuts_nothing_at_80_columns(tmp_path: Path) -> None:
    name = "trainer.lr=0.0003,algorithm.advantage=dr_grpo,seed=1"
    configs = [SimpleNamespace(out_dir=str(tmp_path / n)) for n in (name, "seed=2", "seed=3")]
    left(tmp_path / name, eval_accuracy_before=0.5, eval_accuracy_after=None, weights_sha256="ab" * 32, seconds=1.4)
    (tmp_path / "seed=3").mkdir()
    (tmp_path / "seed=3" / "summary.json").write_text("[half")
    screen, out = piped()
    screen.print(sweep_table(configs))  # type: ignore[arg-type]
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text and "..." not in text
    assert "0.500 -> ?" in text and "ab" * 8 in text and text.count("not finished") == 2
    assert name in "".join(line[7:].split("  ")[0].strip() for line in text.splitlines()[3:])


# the worst sample -----------------------------------------------------------------------------------------------------


def step(counts: list[int], sampler: np.ndarray, trainer: np.ndarray) -> tuple[Any, ...]:
    """Groups of two samples each, their batch and report; the text of a sample is its index, its prompt one token."""
    samples = [Sample((), str(i), 1.0) for i in range(len(counts))]
    problem: Any = SimpleNamespace(prompt="p", answer="a")
    groups = [Group(problem, tuple(samples[i : i + 2])) for i in range(0, len(samples), 2)]
    lengths = np.array(counts) + 1
    rows = suffix_rows(lengths, np.array(counts))
    return (
        groups,
        Batch.of(np.arange(lengths.sum()), lengths, rows, logprobs=sampler),
        SimpleNamespace(logprobs=trainer),
    )


TOKENIZER: Any = SimpleNamespace(decode=lambda ids, special: f"<{ids[0]}>")
log_probs = st.sampled_from([-0.5, -1.0, -2.0, -8.0, float("-inf"), float("nan")])


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=8).filter(lambda n: len(n) % 2 == 0), max_size=5),
    st.data(),
)
def test_the_worst_sample_of_all_steps_is_kept_as_it_happens(steps: list[list[int]], data: st.DataObject) -> None:
    """Whichever step and sample it is in, also across a run that was stopped: with its own tokens."""
    log: Any = SimpleNamespace(worst=None, completions=lambda number, rows: logged.append((number, list(rows))))
    journal = Journal(log, TOKENIZER, "exact", 100, Totals())
    logged: list[tuple[int, list[dict]]] = []
    seen, kept = [], []
    for number, lengths in enumerate(steps, 1):
        values = st.lists(log_probs, min_size=sum(lengths), max_size=sum(lengths))
        sampler, trainer = (np.array(data.draw(values), np.float32) for _ in "st")
        groups, batch, report = step(lengths, sampler, trainer)
        journal.completions(number, groups, Compared(batch, report.logprobs), every=data.draw(st.booleans()))
        at, rows = logged.pop()
        assert at == 100 + number
        seen.append(worst(trainer, sampler)[0])
        for row in rows:
            i = int(row["completion"])
            here = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
            assert row["tokens"] == [sum(lengths[:i]) + i + 1 + j for j in range(lengths[i])]
            assert row["token_texts"] == [f"<{t}>" for t in row["tokens"]]
            for key, whole in (("logprobs", sampler), ("trainer_logprobs", trainer)):
                np.testing.assert_array_equal(np.array(row[key], np.float32), whole[here])
            kept.append(worst(trainer[here], sampler[here])[0])
        log.worst = max(kept)
        assert log.worst == max(seen)


def test_a_run_that_goes_on_knows_the_worst_sample_before_it(tmp_path: Path) -> None:
    row = {"logprobs": [-1.0, -2.0], "trainer_logprobs": [-1.0, -2.5]}
    with RunLog(tmp_path, {}, ()) as log:
        assert log.worst is None
        log.completions(1, [row, {"text": "of one side alone"}])
        ends, found = log.positions(), log.worst
        log.completions(2, [row | {"trainer_logprobs": [-9.0, -2.0]}])
        assert found and log.worst and log.worst > found
    with RunLog(tmp_path, {}, (), positions=ends) as log:  # the second row is cut off
        assert log.worst == found
