"""Several hosts on one Linux machine: each in namespaces of its own (network, mounts, name, processes), with its own /tmp and
/dev/shm, all on one bridge inside an outer namespace. Nothing outlives this process, and the machine's own network is not
touched. What all share is the folder that is given, as SHARED."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from tests.rl.command import ROOT

SHARED = Path("/mnt")  # of all hosts: the folder that is given
NET = "10.77.0"
PROBE = (
    "unshare",
    "-Urnmpf",
    "--mount-proc",
    "sh",
    "-c",
    "ip link add v0 type veth peer name v1 && ip link add b0 type bridge && mount -t tmpfs x /mnt",
)
LIVE = "while :; do sleep 600 & wait; done"  # bash as process 1 buries orphans; sleep would not
RAY = str(Path(sys.executable).with_name("ray"))
PATIENCE = 240.0  # seconds: importing torch takes up to 50 on a busy machine


def unable() -> str:
    """Says why this machine can have no such hosts; "" where it can."""
    if sys.platform != "linux":
        return "needs the namespaces of Linux"
    if missing := [tool for tool in ("unshare", "nsenter", "setpriv", "ip", "mount") if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    if any(path.is_relative_to(top) for path in (ROOT, Path(sys.prefix)) for top in ("/tmp", "/mnt")):
        return f"every host has a /tmp and a /mnt of its own, and {ROOT} or {sys.prefix} lies there"
    tried = subprocess.run(PROBE, capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"no namespaces here: {' '.join(tried.stderr.split())[:200]}"


class Host:
    """Is one of the hosts, `number` from 1 on."""

    def __init__(self, number: int, init: psutil.Process) -> None:
        self.number, self.init, self.address = number, init, f"{NET}.{number}"
        self.name = f"h{number}"

    def start(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Starts a command there, in the shared folder."""
        return subprocess.Popen(
            [*inside(self.init.pid), *command],
            env=environment() | dict(env or {}),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, timeout: float = PATIENCE
    ) -> tuple[int, str, str]:
        """Returns exit code, stdout and stderr of a command there."""
        running = self.start(*command, env=env)
        out, err = running.communicate(timeout=timeout)
        return running.returncode, out, err

    def train(self, *overrides: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Starts a run whose driver is there."""
        return self.start(sys.executable, "-m", "rl.train", *overrides, env=env)

    def processes(self, name: str) -> list[psutil.Process]:
        """Returns the living processes there, by a part of their command line."""
        found = []
        for process in self.init.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """Ends every process of the host at once."""
        self.init.kill()


class Hosts:
    """Is some hosts on one bridge."""

    def __init__(self, count: int, shared: Path, cable: bool = False) -> None:
        """`shared`: a folder outside. `cable`: to the last host, `spoil` works on it."""
        self.shared, self._held = shared, list[subprocess.Popen[bytes]]()
        script = (
            f"ip link set lo up && ip link add br0 type bridge && ip link set br0 up && touch {shared}/.up0; {LIVE}"
        )
        self._outer = self._hold(
            (
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                "-Urnmpf",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-c",
                script,
            ),
            ".up0",
        )
        self.hosts = [self._host(i, cable and i == count) for i in range(1, count + 1)]

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number - 1]

    def _hold(self, command: tuple[str, ...], ready: str) -> psutil.Process:
        """Starts what a namespace hangs on, and returns process 1 of it."""
        (self.shared / ready).unlink(missing_ok=True)
        held = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._held.append(held)
        until = time.monotonic() + 60
        while not (self.shared / ready).exists():
            assert held.poll() is None and time.monotonic() < until, (command, held.poll())
            time.sleep(0.05)
        process = psutil.Process(held.pid)
        while process.name() in ("nsenter", "setpriv", "unshare"):
            (process,) = process.children()
        return process

    def _host(self, i: int, cable: bool) -> Host:
        names = "".join(
            f"{NET}.{j} h{j}{'-eth0' if j == i else ''}\\n" for j in range(1, 9)
        )  # its own is a loopback one
        script = f"""
            mount --bind {self.shared} {SHARED} && mount -t tmpfs -o size=2g shm /dev/shm && mount -t tmpfs tmp /tmp &&
            mkdir /tmp/home && hostname h{i} && ip link set lo up &&
            printf '127.0.0.1 localhost\\n127.0.1.1 h{i}\\n{names}' > /tmp/names && mount --bind /tmp/names /etc/hosts &&
            touch {SHARED}/.up{i}
            {LIVE}"""
        spaces = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
        init = self._hold((*inside(self._outer.pid), *spaces, "bash", "-c", script), f".up{i}")
        if cable:
            self._cable(i)
        else:
            self._ip(f"ip link add v{i} type veth peer name e{i}")
        self._ip(
            f"ip link set v{i} mtu 1500 && ip link set e{i} mtu 1500 netns /proc/{self._seen(init)}/ns/net name eth0"
        )
        self._ip(f"ip link set v{i} master br0 up")
        host = Host(i, init)
        code, _, err = host.run("sh", "-c", f"ip addr add {host.address}/24 dev eth0 && ip link set eth0 up")
        assert code == 0, err
        return host

    def _seen(self, process: psutil.Process) -> int:
        """The pid of a process as the outer namespace has it."""
        (line,) = (x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if x.startswith("NSpid"))
        return int(line.split()[-2])

    def _ip(self, script: str) -> None:
        tried = subprocess.run([*inside(self._outer.pid), "sh", "-c", script], capture_output=True, text=True)
        assert tried.returncode == 0, (script, tried.stderr)

    def _cable(self, i: int) -> None:
        (self.shared / ".cable").write_text("0 0 0")
        command = [sys.executable, str(Path(__file__).with_name("cable.py")), f"v{i}", f"e{i}", f"{self.shared}/.cable"]
        self._held.append(subprocess.Popen([*inside(self._outer.pid), *command], stdin=subprocess.DEVNULL))
        for _ in range(600):
            if not subprocess.run(
                [*inside(self._outer.pid), "ip", "link", "show", f"e{i}"], capture_output=True
            ).returncode:
                return
            time.sleep(0.1)
        raise AssertionError("no cable")

    def spoil(self, delay: float, loss: float, rate: float) -> None:
        """Lets the cable delay (ms) and lose (%) frames, at so many Mbit/s (0: any)."""
        after = self.shared / f".cable{uuid.uuid4().hex}"
        after.write_text(f"{delay} {loss} {rate}")
        after.replace(self.shared / ".cable")

    def cut(self, number: int) -> None:
        """Takes the link of a host down."""
        self._ip(f"ip link set v{number} down")

    def mend(self, number: int) -> None:
        """Brings it up again."""
        self._ip(f"ip link set v{number} up")

    def ray(self, *options: str, cpus: int = 1, env: Mapping[str, str] | None = None) -> None:
        """Starts Ray on every host, the head on the first."""
        for host in self.hosts:
            self.ray_on(host, *options, cpus=cpus, env=env)

    def ray_on(self, host: Host, *options: str, cpus: int = 1, env: Mapping[str, str] | None = None) -> None:
        """Starts Ray on one host."""
        role = ["--head", "--port=6379", "--include-dashboard=false"]
        if host.number > 1:
            role = [f"--address={self[1].address}:6379"]
        sizes = (f"--num-cpus={cpus}", "--object-store-memory=100000000", "--disable-usage-stats")
        what = [RAY, "start", *role, f"--node-ip-address={host.address}", "--temp-dir=/tmp/r", *sizes, *options]
        for _ in range(5):  # Ray gives itself 30 s to start, which is little on a busy machine
            code, out, err = host.run(*what, env=env)
            if code == 0:
                return
            host.run(RAY, "stop", "--force")  # of that host alone: it sees no other processes
        raise AssertionError((out[-800:], err[-800:]))

    def close(self) -> None:
        """Ends all hosts."""
        for host in self.hosts:
            with contextlib.suppress(psutil.Error):
                host.kill()
        for held in reversed(self._held):
            held.kill()
            held.wait()


def inside(pid: int) -> list[str]:
    """Returns the beginning of a command that is to run in the namespaces of a process."""
    return ["nsenter", "-t", str(pid), "-U", "--preserve-credentials", "-n", "-m", "-u", "-i", "-p", "--"]


def environment() -> dict[str, str]:
    """Returns what every command on a host has in its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST", "TMPDIR"))}
    return kept | {
        "HOME": "/tmp/home",
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),  # the kernels are built once
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def hosts(count: int, shared: Path, cable: bool = False) -> Iterator[Hosts]:
    """Makes so many hosts, for a while."""
    made = Hosts(count, shared, cable)
    try:
        yield made
    finally:
        made.close()
