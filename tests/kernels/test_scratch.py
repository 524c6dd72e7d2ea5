"""Folders that exist only while they are worked in, at whatever moment a signal ends the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.scratch import scratch

AT_EVERY_CALL = """
import sys
from kernels.host.command import Terminated
from kernels.scratch import scratch

def fall(frame, event, argument):
    global left
    if frame.f_code.co_filename.endswith(("scratch.py", "contextlib.py")) and event in ("call", "c_return"):
        left -= 1
        if left == 0:
            raise Terminated(15)

total = 0
while True:
    total += 1
    left = total
    sys.setprofile(fall)
    try:
        with scratch() as folder:
            (folder / "in it").mkdir()
            (folder / "in it" / "a file").write_text("")
    except Terminated:
        pass
    finally:
        sys.setprofile(None)
    if left > 0:
        break
print(total)
"""
"""Python raises what a signal's handler raises where a function begins, or one of C's has returned."""


def test_it_is_this_users_alone_and_gone_with_what_is_in_it(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        (folder / "deeper").mkdir()
        (folder / "deeper" / "file").write_text("x")
    assert not list(tmp_path.iterdir())


def test_an_error_removes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the work's"), scratch(tmp_path):
        raise ValueError("the work's own")
    assert not list(tmp_path.iterdir())


def test_a_signal_at_any_call_removes_it(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AT_EVERY_CALL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 5
    assert not list(tmp_path.iterdir())
