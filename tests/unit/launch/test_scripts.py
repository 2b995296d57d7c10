"""The scripts of launch/ and cluster/bootstrap, with stubs for Ray, Slurm and kubectl on PATH."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, wait_until

pytestmark = pytest.mark.process

LOG = """#!/bin/bash
echo "${0##*/} $*" >> "$LOG"
"""
# Options come first and have the form --name=value; the rest is the command of the step.
SRUN = """#!/bin/bash
echo "srun $*" >> "$LOG"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'node1\\nnode2\\nnode3\\n'; else echo "scontrol $*" >> "$LOG"; fi
"""
RAY = """#!/bin/bash
trap 'echo "ray stopped" >> "$LOG"; exit 0' TERM
echo "ray $* token=${#RAY_AUTH_TOKEN} mode=$RAY_AUTH_MODE" >> "$LOG"
while true; do sleep 0.1; done
"""
# Stands for the Python code that waits for the nodes: until the head and the step of the workers run.
NODES_JOIN = """#!/bin/bash
echo "${0##*/} $*" >> "$LOG"
while [[ $(grep -c '^ray ' "$LOG") -lt 2 ]]; do sleep 0.1; done
"""
TRAIN = """#!/bin/bash
echo "orchestrator $* RAY_ADDRESS=$RAY_ADDRESS" >> "$LOG"
trap 'echo "orchestrator saves" >> "$LOG"; exit 143' TERM
for _ in $(seq "$TRAIN_TENTHS"); do sleep 0.1; done
exit "$TRAIN_CODE"
"""


class Stubs:
    """Commands on PATH that log how they are called.

    Args:
        folder: Folder for the commands and their log.
        commands: Scripts by name of the command.
    """

    def __init__(self, folder: Path, **commands: str) -> None:
        self.bin, self.log = folder / "bin", folder / "log"
        self.bin.mkdir()
        self.log.write_text("")
        for name, text in commands.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start a script of this repository."""
        return subprocess.Popen(
            ["bash", str(ROOT / script), *arguments],
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "LOG": str(self.log), "HOME": "/nonexistent", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, **env: str) -> tuple[int, str]:
        """Run a script and return its exit code and stderr."""
        process = self.start(script, *arguments, **env)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def lines(self) -> list[str]:
        """Return the logged calls."""
        return self.log.read_text().splitlines()


SLURM = {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-3]",
    "SLURM_CPUS_ON_NODE": "64",
    "ORCHESTRATOR_INTERFACE": "lo",
    "TRAIN_TENTHS": "1",
    "TRAIN_CODE": "0",
}


@pytest.fixture
def slurm(tmp_path: Path) -> Stubs:
    # The port of the head is never opened, so the stub of the worker does not wait for it.
    worker = SRUN.replace('exec "$@"', 'if [[ $1 == */ray-worker.sh ]]; then exec ray "$@"; fi\nexec "$@"')
    return Stubs(tmp_path, srun=worker, scontrol=SCONTROL, ray=RAY, orchestrator=TRAIN, python3=NODES_JOIN)


def test_slurm_starts_ray_on_every_node_trains_and_stops_ray(slurm: Stubs) -> None:
    code, errors = slurm.run("launch/slurm/train.sbatch", "job.yaml", "--set", "run.seed=2", **SLURM)
    assert code == 0, errors
    lines = slurm.lines()
    (head,) = [line for line in lines if line.startswith("ray start --head")]
    assert "--node-ip-address=127.0.0.1 --port=6379 --dashboard-host=127.0.0.1 --temp-dir=/tmp/ray-7" in head
    assert head.endswith("--num-cpus=64 token=64 mode=token")
    (worker,) = [line for line in lines if "ray-worker.sh" in line and line.startswith("srun")]
    assert "--nodes=2 --ntasks=2 --exclude=node1" in worker
    assert "ray-worker.sh 127.0.0.1:6379 --num-cpus=64" in worker
    assert "python3 - 3 300" in lines
    train = "orchestrator train job.yaml --set run.seed=2 --address auto RAY_ADDRESS=127.0.0.1:6379"
    assert lines.index(train) > lines.index("python3 - 3 300")
    assert lines[-2:] == ["ray stopped"] * 2


@pytest.mark.parametrize("requeue", [False, True])
def test_slurm_forwards_sigterm_and_requeues_if_asked(slurm: Stubs, requeue: bool) -> None:
    env = {**SLURM, "TRAIN_TENTHS": "600", "ORCHESTRATOR_REQUEUE": str(int(requeue))}
    process = slurm.start("launch/slurm/train.sbatch", "job.yaml", **env)
    wait_until(lambda: any("orchestrator train" in line for line in slurm.lines()), 30, "training starts")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    lines = slurm.lines()
    assert lines.count("orchestrator saves") == 1
    assert lines.count("ray stopped") == 2
    assert ("scontrol requeue 7" in lines) == requeue


def test_slurm_returns_the_exit_code_of_the_run(slurm: Stubs) -> None:
    code, _ = slurm.run("launch/slurm/train.sbatch", "job.yaml", **{**SLURM, "TRAIN_CODE": "4"})
    assert code == 4
    assert slurm.lines().count("ray stopped") == 2


def test_slurm_fails_if_ray_ends_before_the_cluster_is_complete(tmp_path: Path) -> None:
    waits = "#!/bin/bash\nexec sleep 60\n"
    stubs = Stubs(tmp_path, srun=SRUN, scontrol=SCONTROL, ray=LOG, orchestrator=TRAIN, python3=waits)
    code, errors = stubs.run("launch/slurm/train.sbatch", "job.yaml", **SLURM)
    assert code == 3
    assert "Ray ended on a node before the cluster was complete" in errors
    assert not any("orchestrator train" in line for line in stubs.lines())


def test_slurm_needs_the_bootstrap_scripts(slurm: Stubs, tmp_path: Path) -> None:
    code, errors = slurm.run(
        "launch/slurm/train.sbatch", "job.yaml", **{**SLURM, "SLURM_SUBMIT_DIR": str(tmp_path)}
    )
    assert code == 2
    assert "submit from the root of a checkout, or set ORCHESTRATOR_ROOT" in errors


def test_ray_submit_uses_the_dashboard_of_the_environment(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, orchestrator=LOG)
    assert stubs.run("launch/ray/submit.sh", "job.yaml", "--no-wait")[0] == 0
    assert stubs.run("launch/ray/submit.sh", "job.yaml", ORCHESTRATOR_DASHBOARD="https://ray.example")[0] == 0
    assert stubs.lines() == [
        "orchestrator submit job.yaml --address http://127.0.0.1:8265 --no-wait",
        "orchestrator submit job.yaml --address https://ray.example",
    ]


def test_kubernetes_submit_applies_the_rendered_manifest(tmp_path: Path) -> None:
    apply = LOG + 'cat >> "$LOG"\n'
    stubs = Stubs(tmp_path, orchestrator=LOG + "echo 'kind: RayJob'\n", kubectl=apply)
    code, _ = stubs.run(
        "launch/kubernetes/submit.sh", "job.yaml", "--gpus-per-node", "4", KUBECTL="kubectl --context c"
    )
    assert code == 0
    assert stubs.lines() == [
        "orchestrator render --target rayjob job.yaml --gpus-per-node 4",
        "kubectl --context c apply --server-side -f -",
        "kind: RayJob",
    ]


def test_kubernetes_submit_applies_nothing_if_rendering_fails(tmp_path: Path) -> None:
    stubs = Stubs(tmp_path, orchestrator=LOG + "exit 2\n", kubectl=LOG)
    assert stubs.run("launch/kubernetes/submit.sh", "job.yaml")[0] == 2
    assert [line.split()[0] for line in stubs.lines()] == ["orchestrator"]


@pytest.mark.parametrize(
    "script",
    [
        "launch/ray/submit.sh",
        "launch/kubernetes/submit.sh",
        "launch/slurm/train.sbatch",
        "cluster/bootstrap/ray-worker.sh",
        "cluster/bootstrap/wait-for-nodes.sh",
    ],
)
def test_scripts_without_arguments_print_their_usage(script: str, tmp_path: Path) -> None:
    code, errors = Stubs(tmp_path).run(script)
    assert code == 2
    assert errors.startswith("usage: ")
    assert os.access(ROOT / script, os.X_OK)


def test_a_worker_gives_up_if_there_is_no_head(tmp_path: Path) -> None:
    code, errors = Stubs(tmp_path, ray=LOG).run(
        "cluster/bootstrap/ray-worker.sh",
        "127.0.0.1:1",
        ORCHESTRATOR_NODE_IP="127.0.0.1",
        ORCHESTRATOR_START_SECONDS="1",
    )
    assert code == 3
    assert "no Ray head at 127.0.0.1:1" in errors


def test_the_address_of_an_unknown_interface_is_an_error(tmp_path: Path) -> None:
    code, errors = Stubs(tmp_path).run("cluster/bootstrap/node-ip.sh", ORCHESTRATOR_INTERFACE="none0")
    assert code != 0
    assert errors
