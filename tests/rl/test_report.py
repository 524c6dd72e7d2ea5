"""report.html: complete, self-contained, escaped, and honest about what differs or is missing."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.charts import Series, line_chart, thin, ticks
from rl.metrics import FORMULAS, divergence
from rl.report import main, merged, write_report

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


def metrics_rows(steps: int, flip_from: int | None = None) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = [{"step": s, "phase": "warmup", "policy/loss": 3.0 - s / 10} for s in range(10)]
    rows.append({"step": 10, "phase": "grpo", "eval/accuracy": 0.52})
    for s in range(steps):
        trainer = -rng.exponential(1, 50).astype(np.float32)
        rollout = trainer.copy()
        if flip_from is not None and s >= flip_from:
            rollout.view(np.uint32)[: s + 1] ^= 1
        rows.append(
            {
                "step": 11 + s,
                "phase": "grpo",
                "reward/mean": 0.5 + 0.001 * s,
                "response/length_mean": 4.0,
                "policy/entropy": 0.7,
                "policy/grad_norm": 0.3,
                **{f"time/{p}": 0.25 for p in ("sample", "score", "train", "publish")},
                **divergence(trainer, rollout, np.arange(50) // 5),
            }
        )
    return rows


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


def written(tmp_path, rows=None, summary=SUMMARY, config=None, completions=()) -> tuple[str, Page]:
    path = tmp_path / "report.html"
    write_report(path, metrics_rows(30) if rows is None else rows, summary, config or {"name": "job"}, completions)
    text = path.read_text()
    return text, Page(text)


def test_the_head_and_the_table(tmp_path):
    _, page = written(tmp_path, completions=[completion()])
    for words in (
        SUMMARY["weights_sha256"],
        "52.0 % → 91.0 %",
        "1,500",
        "3 min 35 s",
        "torch 2.13.0",
        "✓ Exact",
        *FORMULAS,
    ):
        assert words in page.text, words
    assert page.text.count("✓ ideal") == len(FORMULAS) and "✕" not in page.text
    assert "GRPO steps30" in page.text  # the rows that only hold an evaluation are none


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
    config = {"name": EVIL, EVIL: EVIL}
    summary = SUMMARY | {"weights_sha256": EVIL, "versions": {EVIL: EVIL}}
    _, page = written(tmp_path, summary=summary, config=config, completions=[row])
    assert [tag for tag, _ in page.tags].count("script") == 1  # the page's own
    assert not any(tag == "img" or any(a.startswith("on") for a in attributes) for tag, attributes in page.tags)
    assert page.text.count("<script>alert(1)</script>") >= 6


def test_a_flat_zero_line_is_labelled(tmp_path):
    text, page = written(tmp_path)
    assert "0 at every step: 1,500 tokens, all equal" in page.text
    assert text.count('class="line zero"') == 3  # tokens, and the mean and the largest gap


def test_a_difference_is_shown_everywhere(tmp_path):
    rows = metrics_rows(30, flip_from=20)
    summary = SUMMARY | {"tokens_nonzero": 255}
    equal, different = completion("equal"), completion("other", 0b101, step=41)
    text, page = written(tmp_path, rows, summary, completions=[equal, different])
    assert "✕ Not exact: 255 of 1,500 response tokens differ." in page.text
    assert "0 at every step" not in page.text and "✕ off" in page.text
    assert "Step 41" in page.text and "5 of 5 tokens differ in their bits." in page.text
    assert len(re.findall(r'class="tok p\d diff"', text)) == 5 and text.count("2 bits differ") == 5


def test_a_contrast_run_says_so_everywhere(tmp_path):
    rows = [row | {"numerics": "fast"} for row in metrics_rows(4, flip_from=1)]
    for summary in ({"numerics": "fast", "weights_sha256": "ab" * 32}, {}):
        write_report(tmp_path / "report.html", rows, summary, {}, [])
        text = Page((tmp_path / "report.html").read_text()).text
        assert "Contrast run (numerics=fast)" in text and "Not exact" not in text
        assert "SHA-256 of the trained weights (numerics=fast)" in text


def test_a_value_that_looks_ideal_but_is_not_says_so(tmp_path):
    rows = metrics_rows(3)
    rows[-1]["divergence/ratio_max"] = 1 + 1e-9
    _, page = written(tmp_path, rows)
    assert "1 + 1e-09" in page.text and page.text.count("✕ off") == 1


def test_a_value_that_is_not_finite_is_a_cross(tmp_path):
    rows = metrics_rows(30)
    rows[20]["divergence/logprob_abs_diff_max"] = math.inf
    text, page = written(tmp_path, rows)
    assert text.count('class="bad"') == 1 and "✕ not finite" in page.text
    assert "0 at every step, mean and max" not in page.text


def test_an_unfinished_run_and_an_empty_one(tmp_path):
    _, page = written(tmp_path, summary={})
    assert "1,500 response tokens compared so far, 0 differ." in page.text and "has not finished" in page.text
    _, page = written(tmp_path, rows=[], summary={})
    assert "No token was compared yet." in page.text and "Exact" not in page.text


def test_one_step_and_very_many(tmp_path):
    written(tmp_path, metrics_rows(1))
    text, _ = written(tmp_path, metrics_rows(3000), completions=[completion()] * 5)
    assert len(text) < 1_000_000


def test_log_probs_that_are_not_finite_and_token_ids_alone(tmp_path):
    row = completion("123")
    del row["token_texts"]
    row["logprobs"] = [None, -2.0, -3.0]
    _, page = written(tmp_path, completions=[row, {"step": 1, "prompt": "p", "completion": None, "reward": None}])
    assert "not finite" in page.text and "1 of 3 tokens differ in their bits." in page.text


def test_a_step_written_again_is_merged_and_the_later_wins():
    rows = merged([{"step": 2, "a": 1, "b": 1}, {"step": 1, "phase": "warmup"}, {"step": 2, "phase": "grpo", "a": 5}])
    assert rows == [{"step": 1, "phase": "warmup"}, {"step": 2, "a": 5, "b": 1, "phase": "grpo"}]


@given(st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=3000))
def test_thinning_keeps_extremes_and_what_is_not_finite(values):
    points = list(enumerate(values))
    kept = [v for _, v in thin(points, 100)]
    finite, kept_finite = ([v for v in vs if v is not None] for vs in (values, kept))
    assert (None in kept) == (None in values)
    assert not finite or (min(finite), max(finite)) == (min(kept_finite), max(kept_finite))
    assert len(kept) <= max(150, min(len(points), 100))


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_cover_the_range(low, width):
    marks = ticks(low, low + width)
    assert 2 <= len(marks) <= 8 and marks[0] <= low + width * 1e-6 and marks[-1] >= low + width * (1 - 1e-6)


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False, width=32)), max_size=30))
def test_any_values_draw(values):
    Page(line_chart("t", "u", [Series("s", tuple(enumerate(values)))], zero="0"))


def test_the_command_rebuilds_the_page(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics_rows(5)) + '{"step": 99, "ha')
    (tmp_path / "completions.jsonl").write_text(json.dumps(completion()) + "\n")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.yaml").write_text("seed: 17\nname: job\n")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    page = Page((tmp_path / "report.html").read_text())
    assert SUMMARY["weights_sha256"] in page.text and '"seed": 17' in page.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no metrics.jsonl in this folder"),
        ({"metrics.jsonl": '{"step": 0}\n{"step": \n'}, "metrics.jsonl:2: not JSON"),
        ({"metrics.jsonl": "[1]\n"}, "metrics.jsonl:1: must be a JSON object"),
        ({"metrics.jsonl": '{"a": 0}\n'}, 'metrics.jsonl:1: no "step" in this row'),
        ({"metrics.jsonl": '{"step": "x"}\n'}, 'metrics.jsonl:1: "step" must be a number'),
        ({"metrics.jsonl": '{"step": 0}\n', "summary.json": "{"}, "summary.json: not JSON"),
        ({"metrics.jsonl": '{"step": 0}\n', "config.yaml": "a: ["}, "config.yaml: not YAML"),
    ],
)
def test_bad_folders_are_one_line_and_exit_2(tmp_path, capsys, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_the_module_exits_with_2(tmp_path):
    outcome = subprocess.run([sys.executable, "-m", "rl.report", str(tmp_path)], capture_output=True, text=True)
    assert outcome.returncode == 2 and outcome.stderr.count("\n") == 1 and "Traceback" not in outcome.stderr
