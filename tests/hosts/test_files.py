"""The files of a run on hosts: in a folder that all share, or on a disk of each, which no other host sees."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.hosts.conftest import Make
from tests.hosts.namespaces import SHARED, Host, Hosts
from tests.hosts.runs import LONG, LONG_ONES, PATIENCE, RECORDED, RUN, begun, ended
from tests.rl.command import Outcome
from trainer.checkpoint import folders, read

pytestmark = [pytest.mark.slow, pytest.mark.hosts]

OWN = "/tmp/run"  # a path that is another folder on every host
EVERY = ("checkpoint.every=1", "checkpoint.keep=2", "cluster.timeout=1500")


@pytest.fixture(scope="module")
def two(make_hosts: Make) -> Hosts:
    net = make_hosts(2)
    net.ray()
    return net


def seen(host: Host, path: str = OWN) -> Path:
    """A folder of a host's own, from outside."""
    return Path(f"/proc/{host.init.pid}/root{path}")


def stopped_after_a_checkpoint(net: Hosts) -> None:
    """A run over both hosts, on their own disks, that was killed once a checkpoint of GRPO was there."""
    running = net[1].train(*RUN, *EVERY, "cluster.nodes=2", f"out_dir={OWN}")
    until, step = time.monotonic() + PATIENCE, 0
    while step < 1:
        assert running.poll() is None and time.monotonic() < until, ended(running)
        time.sleep(0.2)
        done = folders(seen(net[1]) / "checkpoints")
        step = read(done[0]).run["progress"]["step"] if done else 0
    kill(running)


def kill(running: subprocess.Popen[str]) -> None:
    """Ends a driver as a machine does that goes down: it says nothing and cleans up nothing."""
    for process in psutil.Process(running.pid).children(recursive=True):  # below nsenter
        process.kill()
    ended(running)


def names(host: Host) -> dict[str, set[str]]:
    """The files of each checkpoint on a host's own disk."""
    return {f.name: {p.name for p in f.iterdir()} for f in folders(seen(host) / "checkpoints")}


def resumed(host: Host, *overrides: str) -> Outcome:
    return ended(host.train(*RUN, *EVERY, f"out_dir={OWN}", *overrides))


@LONG_ONES
def test_disks_of_their_own(two: Hosts) -> None:
    """Each keeps the shards of its ranks and the manifest; the run goes on where they were, on one host, and where a shard is
    lost says which and whose."""
    stopped_after_a_checkpoint(two)
    here, there = names(two[1]), names(two[2])
    newest = max(here)
    assert {"rank-0-of-2.safetensors", "checkpoint.json"} <= here[newest] and "rank-1-of-2.safetensors" not in here[
        newest
    ]
    assert there[newest] == {"rank-1-of-2.safetensors", "checkpoint.json"}
    assert set(there) >= set(here)
    aside = seen(two[2], "/tmp/aside")
    shutil.move(seen(two[2]), aside)
    line = resumed(two[1], "cluster.nodes=1", "trainer.world_size=1", "rollout.replicas=1").error()
    assert line.startswith(
        f"{OWN}/checkpoints/{newest}/rank-1-of-2.safetensors is on none of the 2 nodes of this Ray; 10.77.0.2 wrote it"
    )
    shutil.move(aside, seen(two[2]))
    done = resumed(two[1], "cluster.nodes=1", "trainer.world_size=1", "rollout.replicas=1")
    assert done.code == 0 and "resumed" in done.out, done
    assert json.loads((seen(two[1]) / "summary.json").read_text())["weights_sha256"] == RECORDED


@LONG_ONES
def test_a_run_begun_on_one_host_goes_on_on_two(two: Hosts) -> None:
    """The other host lacks all of it. The model, which rank 0 writes, comes to the driver, wherever that rank is."""
    for host in two.hosts:
        shutil.rmtree(seen(host), ignore_errors=True)
    layout = ("trainer.world_size=1", "rollout.replicas=1", "cluster.nodes=1")
    running = two[1].train(*RUN, *EVERY, *layout, f"out_dir={OWN}")
    while not folders(seen(two[1]) / "checkpoints"):
        assert running.poll() is None, ended(running)
        time.sleep(0.2)
    kill(running)
    done = resumed(two[1], "cluster.nodes=2", "save_model=true")
    assert done.code == 0, done
    assert json.loads((seen(two[1]) / "summary.json").read_text())["weights_sha256"] == RECORDED
    assert (seen(two[1]) / "model" / "config.json").exists()
    assert any("rank-1-of-2.safetensors" in files for files in names(two[2]).values())


def test_a_full_disk_of_one_host(two: Hosts) -> None:
    """Ends the run with one line that names the rank and its host; the driver's folder holds no half checkpoint."""
    code, _, err = two[2].run("sh", "-c", "mkdir /tmp/full && mount -t tmpfs -o size=64k full /tmp/full")
    assert code == 0, err
    line = ended(two[1].train(*RUN, *EVERY, "cluster.nodes=2", "out_dir=/tmp/full")).error(1)
    assert "trainer rank 1 (10.77.0.2): the checkpoint could not be written: No space left on device" in line
    assert not folders(seen(two[1], "/tmp/full") / "checkpoints")


def test_one_driver_at_a_time_in_a_shared_folder(two: Hosts) -> None:
    one_host = ("cluster.nodes=1", "trainer.world_size=1", "rollout.replicas=1")
    running = begun(two[1], "taken", *one_host)
    second = ended(two[2].train(*LONG, *one_host, f"out_dir={SHARED}/taken"))
    assert second.code == 2 and "is in use by another process" in second.err, second
    kill(running)
