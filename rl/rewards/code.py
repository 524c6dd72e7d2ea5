"""Rewards code that passes the tests of its row.

Each test runs in a process of its own, in an empty folder that is removed, with limits of CPU time, memory, open files and the
size of files, and without the environment of the run (its keys and tokens). Python refuses it (by an audit hook) sockets, other
processes, and files to write outside of its folder; where the kernel lets a user make namespaces it has no network either. Sets
have one order and `random` one seed, so that a program does the same in every run; near a limit, another machine may decide
otherwise.

This is a fence against mistakes and not against an attacker. It does not protect from a program that reads what the user of
the run can read, that goes around the hooks of Python (a C extension, memory by way of the interpreter), or that looks for how
its success is told and tells it. Whoever trains on programs that may be hostile runs the whole of it in a container or a
machine without secrets and without a network.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rl.data.problem import Problem

_SANDBOX = Path(__file__).with_name("sandbox.py")
_FENCED = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL)
_FILE = 16 << 20  # bytes of what it prints, and of each file
_ENVIRONMENT = {"PATH": os.defpath, "PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
_LATE = (-24, -9)  # SIGXCPU; SIGKILL, of one that ignores it


class Test(NamedTuple):
    """Says what is run after a program, or what it reads and must print."""

    test: str = ""
    stdin: str = ""
    stdout: str | None = None


def code(
    problem: Problem,
    text: str,
    tests: str = "tests",
    partial: bool = False,
    seconds: int = 10,
    memory: int = 1024,
    late: float | None = None,
) -> dict[str, float]:
    """Earns 1 where the program of a completion (its last fenced block, or all of it) passes every test, else 0; `partial`: the
    share that it passes.

    tests    the field of the row, by dotted path: Python code, a list of such, or {"inputs": [...], "outputs": [...]} of
             texts on stdin and stdout, with "fn_name" of arguments and results; as they are or as JSON
    seconds  of CPU time of one test, and three times that of waiting
    memory   MiB of one test
    late     what a program earns that is out of time. A clock decides that: on another machine it may be in time, and the run
             another one. None: it is an error, which ends the run or leaves the sample out (scoring.errors)
    """
    program = (_FENCED.findall(text) or [text])[-1]
    wanted = _tests(_field(problem.record, tests), tests)
    passed = 0
    for test in wanted:
        how = _passes(program, test, seconds, memory)
        if how is None and late is None:
            raise TimeoutError(f"the program took more than {seconds} s (args.seconds; args.late says what that earns)")
        if how is None and late is not None:
            return {"score": late, "passed": passed / len(wanted), "late": 1.0}
        passed += bool(how)
        if not how and not partial:
            break
    share = passed / len(wanted)
    return {"score": share if partial else float(passed == len(wanted)), "passed": share, "late": 0.0}


def _field(record: Any, path: str) -> Any:
    found = record
    for name in path.split("."):
        if not isinstance(found, Mapping) or name not in found:
            known = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise KeyError(f"the row has no field {path!r}; {name!r} is not among {known}")
        found = found[name]
    return found


def _tests(value: Any, field: str) -> list[Test]:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # code may begin so
            value = json.loads(value)
    if isinstance(value, str):
        value = [value]
    if isinstance(value, Mapping) and {"inputs", "outputs"} <= set(value):
        pairs = zip(value["inputs"], value["outputs"], strict=True)
        name = value.get("fn_name")
        found = [
            Test(f"assert {name}(*{i!r}) == {o!r}") if name else Test(stdin=_text(i), stdout=_text(o)) for i, o in pairs
        ]
    elif isinstance(value, list) and all(isinstance(test, str) for test in value):
        found = [Test(test) for test in value]
    else:
        raise TypeError(f"field {field!r} holds no tests: code, a list of it, or inputs and outputs")
    if not found:
        raise ValueError(f"field {field!r} holds no test")
    return found


def _text(lines: Any) -> str:
    return lines if isinstance(lines, str) else "\n".join(map(str, lines))


def _passes(program: str, test: Test, seconds: int, memory: int) -> bool | None:
    """Tells whether a program passes a test; None where it is out of time."""
    done = uuid.uuid4().hex
    name = "__main__" if test.stdout is not None else "program"
    limits = {"seconds": seconds, "memory": memory << 20, "file": _FILE}
    job = {"program": program, "test": test.test, "stdin": test.stdin, "done": done, "name": name, **limits}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        try:
            ended = subprocess.run(
                [sys.executable, "-s", "-P", str(_SANDBOX)],
                input=json.dumps(job).encode(),
                stdout=said,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env=_ENVIRONMENT | {"TMPDIR": folder},
                timeout=3 * seconds,
            )
        except subprocess.TimeoutExpired:
            return None
        if ended.returncode in _LATE:
            return None
        said.seek(0)
        printed = said.read().decode("utf-8", "replace")
    if test.stdout is None:
        return printed.endswith(done)
    return ended.returncode == 0 and _lines(printed.removesuffix(done)) == _lines(test.stdout)


def _lines(text: str) -> list[str]:
    """Returns lines without spaces at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]
