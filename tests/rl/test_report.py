"""report.html: complete, self-contained, escaped, and honest about what differs or is missing."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rl.metrics import FORMULAS, divergence, profile
from rl.report import ReportError, read_lines, reported, write_report
from rl.report.__main__ import main
from rl.report.chart import BOX, Chart, Series, thin, ticks
from rl.report.folder import merged, read_run
from rl.report.sample import WINDOW
from rl.report.timeline import timelines
from rl.run.files import strict

VOID = {"meta", "br", "line", "path", "circle", "rect", "polyline", "input", "link", "img"}


class Page(HTMLParser):
    """Checks that every tag is closed, and keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def hover(self, title: str) -> dict:
        """What the script shows in a chart: by x, the text of each line."""
        (found,) = (a for tag, a in self.tags if tag == "svg" and a["aria-label"] == title)
        told = json.loads(found["data-hover"])
        assert len(told["x"]) == len(told["at"]) == len(told["text"])
        return {name: dict(zip(told["text"], values, strict=True)) for name, values in told["lines"]}


def metrics_rows(steps: int, flip_from: int | None = None, seed: int = 0) -> list[dict]:
    """As a run logs them: 10 supervised steps, an evaluation, GRPO steps of 10 responses of 5 tokens, an evaluation."""
    rng = np.random.default_rng(seed)
    rows = [{"step": s, "phase": "warmup", "policy/loss": 3.0 - s / 10} for s in range(10)]
    rows.append({"step": 10, "phase": "grpo", "eval/accuracy": 0.52})
    for s in range(steps):
        trainer = -rng.exponential(1, 50).astype(np.float32)
        rollout = trainer.copy()
        if flip_from is not None and s >= flip_from:
            rollout.view(np.uint32)[: min(s + 1, 50)] ^= 1
        rows.append(
            {
                "step": 11 + s,
                "phase": "grpo",
                "grpo/step": s + 1,
                "reward/mean": 0.5 + 0.0001 * s,
                "response/length_mean": 4.0,
                "policy/entropy": 0.7,
                "policy/grad_norm": 0.3,
                **{f"time/{p}": 0.25 for p in ("sample", "score", "train", "publish")},
                **divergence(trainer, rollout, np.arange(50) // 5),
                **profile(trainer, rollout, np.arange(50) % 5),
            }
        )
    return [*rows, {"step": 11 + steps, "phase": "grpo", "eval/accuracy": 0.91}]


def completion(text: str = "12", gap_bits: int = 0, **more) -> dict:
    sampler = -np.arange(1, len(text) + 1).astype(np.float32)
    trainer = (sampler.view(np.uint32) ^ np.uint32(gap_bits)).view(np.float32)
    row = {"step": 11, "prompt": "5 + 7", "completion": text, "answer": "12", "reward": 1.0, "tokens": [1] * len(text)}
    texts = {"token_texts": list(text), "logprobs": sampler.tolist(), "trainer_logprobs": trainer.tolist()}
    return row | texts | more


SUMMARY = {
    "weights_sha256": "c0ffee" * 10 + "abcd",
    "eval_accuracy_before": 0.52,
    "eval_accuracy_after": 0.91,
    "tokens_compared": 1500,
    "tokens_nonzero": 0,
    "seconds": 214.7,
    "versions": {"torch": "2.13.0"},
}


def run_folder(path: Path, rows=None, summary=SUMMARY, config=None, completions=()) -> Path:
    """A folder as a run leaves it."""
    path.mkdir(exist_ok=True)
    for name, lines in (("metrics", metrics_rows(30) if rows is None else rows), ("completions", completions)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(strict(row)) + "\n" for row in lines))
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.yaml").write_text(yaml.safe_dump(config or {"name": "job"}))
    return path


def written(tmp_path, *args, **kwargs) -> tuple[str, Page]:
    text = write_report(run_folder(tmp_path / "run", *args, **kwargs)).read_text()
    return text, Page(text)


def test_the_head_and_the_table(tmp_path):
    _, page = written(tmp_path, completions=[completion()])
    for words in (
        SUMMARY["weights_sha256"],
        "52.0 % → 91.0 %",
        "1,500",
        "0:03:35",
        "torch 2.13.0",
        "✓ Exact",
        *FORMULAS,
    ):
        assert words in page.text, words
    assert page.text.count("✓ ideal") == len(FORMULAS) and "✕" not in page.text
    assert "GRPO steps30" in page.text  # the rows that only hold an evaluation are none


def test_rewards_by_name(tmp_path):
    """Where there are several; what is logged beside the sum is none."""
    rows = metrics_rows(3)
    for row in rows[11:-1]:
        row |= {"reward/right": 0.5, "reward/left_out": 1, "reward/errors": 0}
    _, page = written(tmp_path, rows)
    assert "Rewards by name" not in page.text and list(page.hover("Samples left out")) == ["all", "errors"]
    for row in rows[11:-1]:
        row |= {"reward/format": 0.25}
    _, page = written(tmp_path, rows)
    assert page.hover("Rewards by name") == {
        n: dict.fromkeys("123", v) for n, v in (("format", "0.25"), ("right", "0.5"))
    }


def test_steps_are_counted_as_the_console_does(tmp_path):
    """From 1; an evaluation before is at 0, one after the last step is at the last; the warm start counts by itself."""
    _, page = written(tmp_path, completions=[completion(step=41)])
    assert list(page.hover("Reward")["each step"]) == [str(i) for i in range(1, 31)]
    assert page.hover("Held-out accuracy")["accuracy"] == {"0": "52.0 %", "30": "91.0 %"}
    assert list(page.hover("Warm start")["loss"]) == [str(i) for i in range(1, 11)]
    assert "Step 31" in page.text and "step 31" in page.text  # 41 is ten supervised steps and 31


def test_a_run_without_a_step_yet_has_its_evaluation_at_0(tmp_path):
    _, page = written(tmp_path, metrics_rows(0)[:-1], {})
    assert page.hover("Held-out accuracy")["accuracy"] == {"0": "52.0 %"}


def test_nothing_is_loaded_from_anywhere(tmp_path):
    text, page = written(tmp_path, config={"model": {"path": "https://example.org/x"}}, completions=[completion()])
    for tag, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & set(attributes), tag
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
    assert not re.search(r"url\(|@import", text)
    assert set(re.findall(r"https?://[^\s&\"<]*", text)) == {"https://example.org/x"}  # text in the config, no resource


EVIL = "<script>alert(1)</script> \"'&<img src=x onerror=alert(2)>"


def test_everything_is_escaped(tmp_path):
    row = completion(EVIL, 1, prompt=EVIL, answer=EVIL, reward=1.0)
    summary = SUMMARY | {"weights_sha256": EVIL, "versions": {EVIL: EVIL}, "judged_by": EVIL}
    for name, other in ((EVIL, None), (EVIL, tmp_path / "other")):
        if other:
            run_folder(other, summary=summary, config={"name": f"another {EVIL}"}, completions=[row])
        run = run_folder(tmp_path / "run", None, summary, {"name": name, EVIL: EVIL}, [row])
        page = Page(write_report(run, other).read_text())
        assert [tag for tag, _ in page.tags].count("script") == 1  # the page's own
        assert not any(tag == "img" or any(a.startswith("on") for a in attributes) for tag, attributes in page.tags)
        assert page.text.count("<script>alert(1)</script>") >= 6


def test_a_flat_zero_line_is_labelled(tmp_path):
    text, page = written(tmp_path, completions=[completion()])
    assert page.text.count("0 at every step") == 6
    assert "0 at every position" in page.text and "0 at every probability" in page.text
    assert "0 at every token" in page.text and page.hover("Their difference") == {"d": {"0": "0", "1": "0"}}
    assert text.count('class="zero"') == 16  # 11 metrics, max and mean of two kinds of classes, the sample


def test_a_difference_is_shown_everywhere(tmp_path):
    rows = metrics_rows(30, flip_from=20)
    summary = SUMMARY | {"tokens_nonzero": 255}
    equal, different = completion("equal"), completion("other", 0b101, step=41)
    text, page = written(tmp_path, rows, summary, completions=[equal, different])
    assert "✕ Not exact: 255 of 1,500 response tokens differ." in page.text
    assert "0 at every step" not in page.text and "✕ off" in page.text
    assert "Step 31" in page.text and "5 of 5 tokens differ in their bits." in page.text
    assert len(re.findall(r'class="tok p\d diff', text)) == 5 and text.count("2 bits differ") == 5


def test_the_worst_sample_is_the_one_with_the_largest_gap(tmp_path):
    small, large, many = completion("aaaa", 1), completion("bbbb"), completion("cccccc", 1)
    large["trainer_logprobs"][2] += 0.25
    rows = [{"step": 11, "divergence/logprob_abs_diff_max": 0.25}]
    for order in ([small, large, many], [large, many, small], [many, small, large]):
        text, page = written(tmp_path, rows, completions=order)
        assert "1 of 4 tokens differ" in page.text and "token 2, 0.25 nats, is the largest of all steps." in page.text
        assert page.hover("Their difference")["d"] == {"0": "0", "1": "0", "2": "0.25", "3": "0"}
        assert len(re.findall(r'class="tok p\d diff worst"', text)) == 1
    _, page = written(tmp_path, [rows[0] | {"divergence/logprob_abs_diff_max": 0.5}], completions=[large])
    assert "is the largest of the completions that were kept" in page.text  # another was not logged


def test_gaps_of_all_steps_by_size_position_and_probability(tmp_path):
    rollout = np.log(np.float32([0.995, 0.4, 0.4, 0.05]))
    rows = []
    for step, gap in ((1, 0.0), (2, 0.02)):
        trainer = rollout + np.float32([0, 0, gap, gap / 4])
        rows.append({"step": step, "grpo/step": step, "reward/mean": 0.5} | profile(trainer, rollout, np.arange(4)))
    _, page = written(tmp_path, rows, completions=[])
    assert page.hover("Sizes of gaps")["tokens"] == {"equal": "75.0 %", "0.003": "12.5 %", "0.01": "12.5 %"}
    assert page.hover("Gap by position")["max"] == {"0": "0", "1": "0", "2": "0.02"}  # 2 and 3 are one class
    assert page.hover("Gap by position")["mean"]["2"] == "0.00625"
    assert page.hover("Gap by probability")["max"] == {"0.01": "0.005", "0.1": "0.02", "0.99": "0"}


def test_a_contrast_run_says_so_everywhere(tmp_path):
    rows = [row | {"numerics": "fast"} for row in metrics_rows(4, flip_from=1)]
    for i, summary in enumerate(({"numerics": "fast", "weights_sha256": "ab" * 32}, {})):
        text = Page(write_report(run_folder(tmp_path / str(i), rows, summary)).read_text()).text
        assert "Contrast run (numerics=fast)" in text and "Not exact" not in text
        assert "SHA-256 of the trained weights (numerics=fast)" in text


def test_a_value_that_looks_ideal_but_is_not_says_so(tmp_path):
    rows = metrics_rows(3)
    rows[-2]["divergence/ratio_max"] = 1 + 1e-9
    _, page = written(tmp_path, rows)
    assert "1 + 1e-9" in page.text and page.text.count("✕ off") == 1
    assert page.hover("Importance ratio")["max"]["3"] == "1e-9"


def test_a_value_that_is_not_finite_is_a_cross(tmp_path):
    rows = metrics_rows(30)
    rows[20]["divergence/logprob_abs_diff_max"] = math.inf
    text, page = written(tmp_path, rows)
    assert text.count('class="cross"') == 1 and "✕ not finite" in page.text
    assert page.hover("Gap of log-probabilities")["max"]["10"] == "not finite"


def test_an_unfinished_run_and_an_empty_one(tmp_path):
    _, page = written(tmp_path, summary={})
    assert "1,500 response tokens compared so far, 0 differ." in page.text and "has not finished" in page.text
    (tmp_path / "none").mkdir()
    page = Page(write_report(run_folder(tmp_path / "none", rows=[], summary={})).read_text())
    assert "No token was compared yet." in page.text and "Exact" not in page.text
    assert page.text.count("Nothing is logged yet.") == 3


def test_a_report_stays_small(tmp_path):
    written(tmp_path, metrics_rows(1))
    long = completion("x" * 8000, 1, prompt="y" * 100_000)
    text, page = written(tmp_path, metrics_rows(3000, flip_from=0), completions=[long] * 5)
    assert len(text) < 1_000_000
    assert text.count('class="tok ') == WINDOW and f"of {8000}." in page.text
    other = run_folder(tmp_path / "other", metrics_rows(3000, 0, seed=1), config={"name": "b"}, completions=[long] * 5)
    assert write_report(tmp_path / "run", other).stat().st_size < 1_200_000


def test_log_probs_that_are_not_finite_and_token_ids_alone(tmp_path):
    row = completion("123")
    del row["token_texts"]
    row["logprobs"] = [None, -2.0, -3.0]
    _, page = written(tmp_path, completions=[row, {"step": 1, "prompt": "p", "completion": None, "reward": None}])
    assert "not finite" in page.text and "1 of 3 tokens differ in their bits." in page.text


# two runs -------------------------------------------------------------------------------------------------------------


def test_a_second_run_is_drawn_beside_the_first(tmp_path):
    exact = run_folder(tmp_path / "exact", config={"name": "a", "numerics": "exact", "trainer": {"lr": 1}})
    rows = [row | {"numerics": "fast"} for row in metrics_rows(30, flip_from=3)]
    told = SUMMARY | {"numerics": "fast", "tokens_nonzero": 462, "weights_sha256": "dec0de"}
    fast = run_folder(tmp_path / "fast", rows, told, {"name": "b", "numerics": "fast", "trainer": {"lr": 2}})
    path = write_report(exact, fast)
    page = Page(path.read_text())
    assert path == exact / "report-against-fast.html" and not (exact / "report.html").exists()
    assert "✓ Exact" in page.text and "Contrast run (numerics=fast): 462 of 1,500" in page.text
    assert SUMMARY["weights_sha256"] in page.text and "dec0de" in page.text
    assert "trainer.lr12" in page.text.replace("\n", "") and "nameab" in page.text.replace("\n", "")
    assert "The runs part at step 4, first in divergence/tokens_nonzero: 0.0 and 4.0." in page.text
    assert set(page.hover("Tokens that differ")) == {"a", "b"}
    assert set(page.hover("Gap of log-probabilities")) == {"max, a", "max, b", "mean, a", "mean, b"}
    assert page.hover("Tokens that differ")["a"]["30"] == "0" and page.hover("Tokens that differ")["b"]["30"] == "30"


def test_two_layouts_of_one_run_are_said_to_be_equal(tmp_path):
    a = run_folder(tmp_path / "a", config={"name": "a"})
    slower = [row | ({"time/sample": 9.0, "speed/x": 1} if "reward/mean" in row else {}) for row in metrics_rows(30)]
    b = run_folder(tmp_path / "b", slower, config={"name": "b"})
    assert "All figures of the 30 steps that both have are equal." in Page(write_report(a, b).read_text()).text
    b = run_folder(tmp_path / "b", metrics_rows(30)[:11], config={"name": "b"})
    assert "The runs have no step in common." in Page(write_report(a, b).read_text()).text


def test_two_runs_of_one_name_are_refused(tmp_path):
    a, b = run_folder(tmp_path / "a"), run_folder(tmp_path / "b")
    with pytest.raises(ReportError, match="both are called job"):
        write_report(a, b)


# pieces ---------------------------------------------------------------------------------------------------------------


def test_a_step_written_again_is_merged_and_the_later_wins():
    rows = merged([{"step": 2, "a": 1, "b": 1}, {"step": 1, "phase": "warmup"}, {"step": 2, "phase": "grpo", "a": 5}])
    assert rows == [{"step": 1, "phase": "warmup"}, {"step": 2, "a": 5, "b": 1, "phase": "grpo"}]


def test_of_completions_the_first_step_the_last_and_the_worst_are_kept(tmp_path):
    rows = [completion("ab", step=s, prompt=f"{s}.{i}") for s in range(11, 61) for i in range(3)]
    rows[70] = completion("ab", 1, step=rows[70]["step"], prompt="worst")
    run = read_run(run_folder(tmp_path / "run", completions=rows))
    assert [row["prompt"] for row in run.completions] == ["11.0", "11.1", "11.2", "60.0", "60.1", "60.2"]
    assert run.worst["prompt"] == "worst" and run.completions[-1]["x"] == 50


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=3000))
def test_thinning_keeps_extremes_and_what_is_not_finite(values):
    points = list(enumerate(values))
    kept = [v for _, v in thin(points, 100)]
    finite, kept_finite = ([v for v in vs if v is not None] for vs in (values, kept))
    assert (None in kept) == (None in values)
    assert not finite or (min(finite), max(finite)) == (min(kept_finite), max(kept_finite))
    assert len(kept) <= max(150, min(len(points), 100))


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e6))
def test_ticks_cover_the_range(low, relative):
    """Of any range that is at least a millionth of where it lies: between ticks finer than that, doubles are too few."""
    width = max(abs(low), 1e-3) * relative
    marks = ticks(low, low + width)
    assert 2 <= len(marks) <= 8 and marks[0] <= low + width * 1e-6 and marks[-1] >= low + width * (1 - 1e-6)
    assert marks == sorted(set(marks))


any_number = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(st.lists(st.one_of(st.none(), any_number), max_size=30), max_size=3), st.booleans(), st.data())
def test_any_values_are_drawn_inside_the_box_and_in_order(lines, log, data):
    if log:
        lines = [[None if v is None else abs(v) for v in values] for values in lines]
    chart = Chart("t", "u", [Series("s", list(enumerate(values))) for values in lines], log=log, flat="0")
    pixels = [p for s in chart.series for piece in chart.stretches(s) for p in piece]
    assert all(BOX["left"] <= x <= BOX["right"] and BOX["top"] <= y <= BOX["bottom"] for x, y in pixels)
    finite = [v for values in lines for v in values if v is not None]
    if finite:
        a, b = (data.draw(st.sampled_from(finite)) for _ in "ab")
        assert a < b or chart.py(a) <= chart.py(b)
    json.dumps(chart.hover(), allow_nan=False)


# the command ----------------------------------------------------------------------------------------------------------


def call(capsys, *arguments) -> tuple[int, str, str]:
    try:
        main([str(a) for a in arguments])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_the_command_rebuilds_the_page(tmp_path, capsys):
    run = run_folder(tmp_path / "run", completions=[completion()], config={"seed": 17, "name": "job"})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "ha')  # half a line, of a run that is writing
    assert call(capsys, run) == (0, f"{run / 'report.html'}\n", "")
    page = Page((run / "report.html").read_text())
    assert SUMMARY["weights_sha256"] in page.text and "seed: 17" in page.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no metrics.jsonl in this folder"),
        ({"metrics.jsonl": '{"step": 0}\n{"step": \n'}, "metrics.jsonl:2: not JSON"),
        ({"metrics.jsonl": "[1]\n"}, "metrics.jsonl:1: must be a JSON object"),
        ({"metrics.jsonl": "[" * 100_000 + "\n"}, "metrics.jsonl:1: not JSON"),
        ({"metrics.jsonl": '{"step": 1' + "0" * 5000 + "}\n"}, "metrics.jsonl:1: not JSON"),
        ({"metrics.jsonl": '{"a": 0}\n'}, 'metrics.jsonl:1: no "step" in this row'),
        ({"metrics.jsonl": '{"step": "x"}\n'}, 'metrics.jsonl:1: "step" must be a number'),
        ({"metrics.jsonl": '{"step": 0}\n', "summary.json": "{"}, "summary.json: not JSON"),
        ({"metrics.jsonl": '{"step": 0}\n', "config.yaml": "a: ["}, "config.yaml: not YAML"),
    ],
)
def test_bad_folders_are_one_line_and_exit_2(tmp_path, capsys, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    good = run_folder(tmp_path / "good")
    for arguments in ((tmp_path,), (good, tmp_path)):
        code, _, err = call(capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, capsys, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("rl.report.page.write_atomic", full)
    code, _, err = call(capsys, run_folder(tmp_path / "run"))
    assert code == 2 and "report.html: No space left on device" in err and err.count("\n") == 1


def test_the_module_exits_with_2(tmp_path):
    outcome = subprocess.run([sys.executable, "-m", "rl.report", str(tmp_path)], capture_output=True, text=True)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1 and "Traceback" not in outcome.stderr


def test_a_run_that_fails_leaves_its_page_and_its_own_error(tmp_path):
    run = run_folder(tmp_path / "run", summary={})
    with pytest.raises(KeyError), reported(run):
        raise KeyError
    assert "has not finished" in (run / "report.html").read_text()
    with pytest.raises(KeyError), reported(tmp_path / "nowhere"):
        raise KeyError
    with pytest.raises(ReportError), reported(tmp_path / "nowhere"):
        pass


def test_lines_up_to_a_byte(tmp_path):
    (tmp_path / "f").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert [row["step"] for row in read_lines(tmp_path / "f", 24)] == [1, 2]
    assert [row["step"] for row in read_lines(tmp_path / "f", 23)] == [1]
    assert read_lines(tmp_path / "absent") == []


def with_spans(rows: list[dict], overlap: bool) -> list[dict]:
    """Steps of 2 s of sampling and 1 s of training, 0.2 of publishing: beside each other, or one after the other."""
    begin = 1_700_000_000.0
    for row in (row for row in rows if "grpo/step" in row):
        train = begin if overlap else begin + 2
        end = max(begin + 2, train + 1)
        spans = [
            ["sampler", "sample", begin, begin + 2],
            ["none", "wait", train + 1, end],
            ["trainer", "train", train, train + 1],
            ["both", "publish", end, end + 0.2],
        ]
        row |= {
            "time/step": end + 0.2 - begin,
            "time/step_over_longer_half": (end + 0.2 - begin) / 2,
            "time/spans": spans,
        }
        begin = end + 0.5
    return rows


@pytest.mark.parametrize(("overlap", "mean"), [(True, "1.10"), (False, "1.60")])
def test_time_lines_of_both_sides(overlap: bool, mean: str, tmp_path: Path) -> None:
    rows = with_spans(metrics_rows(6), overlap)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(strict(row)) + "\n" for row in rows))
    (line,) = timelines([read_run(tmp_path)])
    bars = {
        said: [b for b in line.bars() if said in b.text] for said in ("sampler samples", "trainer trains", "publishes")
    }
    assert [len(found) for found in bars.values()] == [4, 4, 8] and len(line.bars()) == 16
    assert [text for _, text in line.steps()] == ["3", "4", "5", "6"]
    for sample, train in zip(bars["sampler samples"], bars["trainer trains"], strict=True):
        assert sample.y < train.y and sample.width == pytest.approx(2 * train.width, abs=0.3)
        assert train.x == pytest.approx(sample.x if overlap else sample.x + sample.width, abs=0.3)
    edges = [(b.x, b.x + b.width) for b in line.bars()]
    assert min(x for x, _ in edges) == BOX["left"] and max(x for _, x in edges) == pytest.approx(BOX["right"], abs=0.2)
    page = Page(write_report(tmp_path).read_text())
    assert f"A step took {mean} of the longer" in page.text and "Both sides at work" in page.text
    assert len([1 for tag, a in page.tags if tag == "rect" and "fill" in a.get("style", "")]) >= 16


def test_a_time_line_ends_where_a_run_was_resumed_or_logged_none(tmp_path: Path) -> None:
    rows = with_spans(metrics_rows(6), True)
    del next(row for row in rows if row.get("grpo/step") == 4)["time/spans"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(strict(row)) + "\n" for row in rows))
    (line,) = timelines([read_run(tmp_path)])
    assert [text for _, text in line.steps()] == ["5", "6"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(strict(row)) + "\n" for row in metrics_rows(3)))
    assert not timelines([read_run(tmp_path)])
    assert "Both sides at work" not in write_report(tmp_path).read_text()
