"""Bad arguments of the commands that take long: one line and exit code 2 before any work, and not a result that is lost."""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kernels.host.command import Parser, Terminated, count, interruptible, output, terminable, threads

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
    assert capsys.readouterr().err == "samebit: error: ended by SIGTERM\n"


def test_a_second_signal_does_not_disturb_the_way_out() -> None:
    ended = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    with pytest.raises(Terminated) as error, terminable():
        try:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            ended.append(True)
    signal.signal(signal.SIGHUP, before)
    assert ended and error.value.code == 129 and str(error.value) == "SIGHUP"


def test_who_ignores_a_closed_terminal_goes_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't allocate memory: you tried to allocate 8 bytes.")]
)
def test_memory_that_is_short_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, interruptible():
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and line.startswith("samebit: error: out of memory")
    with pytest.raises(RuntimeError, match="a fault"), interruptible():
        raise RuntimeError("a fault")
