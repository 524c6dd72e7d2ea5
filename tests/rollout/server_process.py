"""A server in a process of its own, on a port that the system picks."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0


class Server:
    def __init__(self, *arguments: str, shell: str = "", **environment: str) -> None:
        """`shell`: a command that sets limits of the process."""
        device = [] if any(a.startswith("device=") for a in arguments) else ["device=cpu"]
        command = [sys.executable, "-m", "rollout.serve", "port=0", "threads=1", *device, *arguments]
        if shell:
            command = ["sh", "-c", f'{shell} && exec "$@"', "sh", *command]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {**os.environ, "PYTHONPATH": path, **environment}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._client: httpx.Client | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = wait_for(self._find_url, "the server did not start")

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)

    def _find_url(self) -> str | None:
        assert self.process.poll() is None, "".join(self.lines)
        found = re.search(r"on (http://\S+)", "".join(self.lines))
        return found and found[1]

    def client(self, **options: Any) -> httpx.Client:
        """One for all that ask for nothing special: making one takes longer than most requests."""
        if options:
            return httpx.Client(base_url=self.url, timeout=PATIENCE, **options)
        if self._client is None:
            self._client = httpx.Client(base_url=self.url, timeout=PATIENCE)
        return self._client

    def metric(self, name: str) -> float:
        """Of all labels together."""
        found = re.findall(rf"^samebit_{name}(?:\{{.*\}})? (\S+)$", self.client().get("/metrics").text, re.M)
        return sum(map(float, found))

    def idle(self) -> bool:
        return self.metric("waiting") == self.metric("running") == 0 and self.metric("pages_free") == self.metric(
            "pages"
        )

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def code(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE)


@contextlib.contextmanager
def running(*arguments: str, shell: str = "", **environment: str) -> Iterator[Server]:
    server = Server(*arguments, shell=shell, **environment)
    try:
        yield server
    finally:
        server.close()


def wait_for(condition: Any, what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(what)
