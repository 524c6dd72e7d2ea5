"""Bad arguments of the commands that take long: one line and exit code 2 before any work, and not a result that is lost."""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kernels.host.command import Parser, count, interruptible, output, threads

NUMBERS = {
    "kernels.bench.__main__": ("--threads",),
    "rollout.bench": ("--threads", "--repeats", "--prompt", "--new", "--batches"),
    "rollout.bench_scheduler": ("--running", "--prompt", "--steps"),
    "trainer.bench": ("--threads", "--repeats", "--layers", "--shapes"),
}
CASES = [(name, [option, "0"]) for name, options in NUMBERS.items() for option in options]
CASES += [(name, ["--json", "/does/not/exist/rows.json"]) for name in NUMBERS]
CASES += [("rollout.bench", ["--new", "1000"]), ("trainer.bench", ["--shapes", "1x1025"])]
CASES += [("trainer.bench", ["--shapes", shape]) for shape in ("5", "axb", "0x5", "5x0", "1x1", "-1x5")]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_bad_arguments(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr("torch.set_num_threads", lambda _: pytest.fail("the work began"))
    with pytest.raises(SystemExit) as end:
        command.main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1, err
    assert err.startswith("samebit: error: ") and arguments[0] in err


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    parser.add_argument("--count", type=count)
    parser.add_argument("--threads", type=threads)
    parser.add_argument("--json", type=output)
    file = tmp_path / "rows.json"
    args = parser.parse_args(["--count", "7", "--threads", "512", "--json", str(file)])
    assert (args.count, args.threads, args.json) == (7, 512, file) and not file.exists()
    for option, value in {"--count": str(2**31), "--threads": "513", "--json": str(tmp_path)}.items():
        with pytest.raises(SystemExit):
            parser.parse_args([option, value])
        assert f"argument {option}: " in capsys.readouterr().err


def test_an_interrupt_is_one_line_and_termination_unwinds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, interruptible():
        raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr().err == "samebit: error: interrupted\n"
    with pytest.raises(SystemExit) as end, interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
