"""The scripts for clusters: their syntax, what they would start, and the fields of the RayJob."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "recipes" / "cluster"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# KubeRay's API reference (ray.io/v1): https://ray-project.github.io/kuberay/reference/api/
JOB = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished", "shutdownAfterJobFinishes",
    "suspend",
}  # fmt: skip
CLUSTER = {
    "authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs",
}  # fmt: skip
HEAD = {"template", "headService", "enableIngress", "rayStartParams", "serviceType"}
WORKERS = {
    "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "rayStartParams", "template",
    "scaleStrategy", "numOfHosts",
}  # fmt: skip


@pytest.mark.parametrize("name", ["node.sh", "slurm.sh"])
def test_syntax(name: str) -> None:
    assert os.access(HERE / name, os.X_OK)
    subprocess.run(["bash", "-n", str(HERE / name)], check=True)


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job of two nodes whose programs write down how they were called."""
    programs = {
        "scontrol": "printf 'n1\\nn2\\n'",
        "srun": 'case "$*" in *" ip "*route*) echo "default via 10.0.0.254 dev ib7 proto dhcp";; *" ip "*addr*) '
        'echo "3: ib7 inet 10.0.0.1/24 brd 10.0.0.255 scope global ib7";; *) exec sleep 60;; esac',
        "ip": 'echo "local $4 dev lo src ${OWN:-10.0.0.2} uid 0"',
        "ray": 'cat "$RAY_AUTH_TOKEN_PATH" >> $CALLS.token; exit 0',
        "python": 'case "$*" in *rl.train*) exit "${CODE:-0}";; esac',
        "sleep": "exec /bin/sleep $@",
    }
    out = tmp_path / "bin"
    out.mkdir()
    for name, body in programs.items():
        (out / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
        (out / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
    return os.environ | slurm | {"PATH": f"{out}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}


@pytest.mark.parametrize("code", [0, 2])
def test_a_slurm_job(stubs: dict[str, str], code: int) -> None:
    script = [str(HERE / "slurm.sh"), "+recipe=x", "steps=3"]
    done = subprocess.run(script, env=stubs | {"CODE": str(code)}, capture_output=True, text=True, timeout=120)
    calls = Path(stubs["CALLS"]).read_text().splitlines()
    assert done.returncode == code, done
    assert any(
        c.startswith("srun --overlap --ntasks-per-node=1 recipes/cluster/node.sh 10.0.0.1 --block") for c in calls
    )
    wanted = "python -m recipes.cluster.wait 10.0.0.1:6379 2"
    run = "python -m rl.train cluster.address=10.0.0.1:6379 cluster.nodes=2 cluster.interface=ib7 +recipe=x steps=3"
    assert calls.index(wanted) < calls.index(run)
    assert not list(Path(stubs["SLURM_SUBMIT_DIR"]).glob(".ray-token*")), "the token stays behind"


@pytest.mark.parametrize("own", ["10.0.0.1", "10.0.0.2"])
def test_a_node(stubs: dict[str, str], tmp_path: Path, own: str) -> None:
    token = tmp_path / "token"
    token.write_text("x")
    (tmp_path / "bin" / "bash").symlink_to("/bin/bash")
    env = stubs | {"OWN": own, "RAY_AUTH_TOKEN_PATH": str(token)}
    done = subprocess.run(
        [str(HERE / "node.sh"), own, "--num-gpus=8"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done
    calls = Path(stubs["CALLS"]).read_text().splitlines()
    assert calls[-1] == f"ray start --head --port=6379 --node-ip-address={own} --disable-usage-stats --num-gpus=8"


def test_a_node_without_a_token(stubs: dict[str, str]) -> None:
    done = subprocess.run([str(HERE / "node.sh"), "10.0.0.1"], env=stubs, capture_output=True, text=True)
    assert done.returncode and "set RAY_AUTH_TOKEN_PATH to a file with a token" in done.stderr


def test_the_ray_job() -> None:
    job: dict[str, Any] = yaml.safe_load((HERE / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert set(spec) <= JOB and set(cluster) <= CLUSTER and set(cluster["headGroupSpec"]) <= HEAD
    assert cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert set(group) <= WORKERS
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert f"cluster.nodes={group['replicas']}" in spec["entrypoint"]
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        (container,), volumes = template["spec"]["containers"], {v["name"] for v in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    parameters = [cluster["headGroupSpec"]["rayStartParams"], group["rayStartParams"]]
    assert all(isinstance(value, str) for some in parameters for value in some.values())  # as the operator demands
