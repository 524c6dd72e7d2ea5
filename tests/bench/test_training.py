"""The benchmark on a GPU, without one: what it counts, how it compares, what it refuses."""

import io
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from kernels.bench import training
from kernels.bench.training_card import BODY, HEAD, STEP, print_table, table_rows
from kernels.model import known

SIX = replace(known.QWEN3_8B, layers=6)


def test_work_is_counted_by_hand() -> None:
    body, head, step = table_rows(SIX, ["4x2048"])
    layer = 4096 * (6144 + 4096 + 24576 + 12288) + 2 * 4096 + 2 * 128  # q, k, v; o; gate, up; down; norms
    attention = 6 * 3 * 4 * 4096 * 1024 * 8192  # layers, backward too, operations, width, keys in the mean, tokens
    assert body.work == 6 * (6 * layer + 4096) * 8192 + attention
    assert head.work == step.work == body.work + 6 * 151936 * 4096 * 8192
    assert (body.part, head.part, step.part) == (BODY, HEAD, STEP)


def test_work_of_a_mixture_is_that_of_the_chosen_experts() -> None:
    (body, *_) = table_rows(replace(known.QWEN3_30B_A3B, layers=4), ["8x1024"])
    experts = 8 * 3 * 768 + 128  # gate, up, down of each chosen one; the router
    layer = 2048 * (5120 + 4096 + experts) + 2 * 2048 + 2 * 128
    attention = 4 * 3 * 4 * 4096 * 512 * 8192
    assert body.work == 6 * (4 * layer + 2048) * 8192 + attention


def test_ratios_are_of_times() -> None:
    (row, *rest) = rows = table_rows(SIX, ["1x64"])
    row.milliseconds |= {"exact": 2.0, "fast": 1.6, "transformers": 3.0}
    row.peak_bytes |= {"exact": 3 << 30, "transformers": 5 << 29}
    assert row.ratio("transformers", "exact") == 1.5 and row.ratio("exact", "fast") == 1.25
    assert rest[0].ratio("exact", "fast") is None
    console = Console(width=200, file=io.StringIO(), record=True)
    print_table(rows, 700.0, console)
    text = console.export_text()
    assert all(word in text for word in ("transformers / exact", "1.500", "exact / fast", "1.250", "3.0", "2.5"))
    assert "compiled" not in text


@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--fast"], ["--compiled"]])
def test_what_it_cannot_do_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer.bench", *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        training.main()
    assert "error: --" in capsys.readouterr().err
