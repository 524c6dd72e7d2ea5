"""No figure is lost on a narrow terminal, nor in a log file."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kernels.bench.cards import print_table
from kernels.bench.table import LOG_WIDTH, console, show
from kernels.bench.timer import Result

WORDS = st.text("abcdefgh ,", min_size=1, max_size=60).map(str.strip)
FIGURES = st.floats(0, 1e6).map(lambda x: f"{x:,.3f}")


def printed(width: int, *table: object) -> str:
    file = io.StringIO()
    show(Console(file=file, width=width), *table)  # type: ignore[arg-type]
    return file.getvalue()


@given(st.integers(20, 200), st.lists(st.tuples(WORDS, WORDS, st.tuples(FIGURES, FIGURES), FIGURES), max_size=4))
def test_every_figure_is_there_in_order(width: int, rows: list[tuple[str, str, tuple[str, str], str]]) -> None:
    text = printed(width, ("op", "case"), ("ours", "torch / ours"), rows)
    figures = sorted(part for row in rows for part in (*row[2], row[3]))
    assert sorted(word for word in text.split() if word.replace(",", "").replace(".", "").isdigit()) == figures
    assert "…" not in text


def test_the_card_table_fits_80_columns() -> None:
    baselines = {"copying kernel": 1234.5}
    case = "qkv 6144x4096, 8 leaves"
    row = Result("attention_backward", case, "16 x 1024 tokens", None, 0.9, 1500.0, baselines, 812.0, "TFLOP/s", 0)
    for width in (80, 140):
        file = io.StringIO()
        print_table([row], Console(file=file, width=width))
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert all(word in file.getvalue() for word in ("1.50 ms", "812 TFLOP/s", "1.23 ms", "0.823", "not met"))


def test_a_log_file_has_long_lines_unless_columns_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console(io.StringIO()).width == LOG_WIDTH
    monkeypatch.setenv("COLUMNS", "80")
    assert console(io.StringIO()).width == 80
