"""What is found on nodes, and what is said of it: value, rule and remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster import preflight
from orchestrator.cluster.preflight import PACKAGES, Finding, Found, Gpu, judge

H100 = Gpu("NVIDIA H100 80GB HBM3", 81559, "570.1")
VERSIONS = {"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")}
FIRST = Found(
    "10.0.0.1", "a", (H100,) * 8, shm_bytes=2**34, interface="eth0", compiler=True, versions=VERSIONS,
    skew_seconds=0.001,
)  # fmt: skip
SECOND = replace(FIRST, node="10.0.0.2", hostname="b")


def said(*found: Found, wants_gpus: bool = True) -> list[Finding]:
    return judge(found, wants_gpus)


def only(level: str, *found: Found, wants_gpus: bool = True) -> str:
    (finding,) = said(*found, wants_gpus=wants_gpus)
    assert finding.level == level
    return finding.sentence


def test_two_nodes_alike_are_ready() -> None:
    assert said(FIRST, SECOND) == []
    assert said(replace(FIRST, gpus=()), wants_gpus=False) == []


def test_versions_must_be_the_same() -> None:
    other = replace(SECOND, versions={**VERSIONS, "torch": "1.1"})
    sentence = only("problem", FIRST, other)
    assert "torch differs between nodes (1.0 on 10.0.0.1, 1.1 on 10.0.0.2)" in sentence
    missing = replace(SECOND, versions={**VERSIONS, "peft": None})
    assert "peft differs between nodes (1.0 on 10.0.0.1, none on 10.0.0.2)" in only("problem", FIRST, missing)


def test_a_package_that_is_nowhere_is_a_problem_but_not_this_one() -> None:
    without = [replace(one, versions={**VERSIONS, "deepspeed": None}) for one in (FIRST, SECOND)]
    assert "deepspeed is installed on no node" in only("problem", *without)
    submitted = [replace(one, versions={**VERSIONS, PACKAGES[-1]: None}) for one in (FIRST, SECOND)]
    assert said(*submitted) == []


def test_gpus_of_other_kinds_and_numbers_are_warnings() -> None:
    a100 = replace(H100, name="NVIDIA A100-SXM4-80GB", driver="550.2")
    sentences = [finding.sentence for finding in said(FIRST, replace(SECOND, gpus=(a100,) * 4))]
    assert len(sentences) == 3
    assert "GPU models differ (NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3)" in sentences[0]
    assert "GPU drivers differ (550.2, 570.1)" in sentences[1]
    assert "different numbers of GPUs (8 on 10.0.0.1, 4 on 10.0.0.2)" in sentences[2]


def test_a_cluster_without_a_gpu_that_answers_is_a_problem() -> None:
    bare = replace(FIRST, gpus=())
    assert "no node has a GPU that nvidia-smi shows" in only("problem", bare)
    broken = replace(bare, gpu_error="driver mismatch")
    sentence = only("problem", broken, wants_gpus=False)
    assert sentence == "10.0.0.1 (a): nvidia-smi fails (driver mismatch); check the driver"


def test_dockers_64_mib_of_shm_are_a_problem_with_several_gpus() -> None:
    assert "/dev/shm has 64 MiB, and NCCL and Ray want 8192 MiB" in only(
        "problem", replace(FIRST, shm_bytes=2**26)
    )
    single = replace(FIRST, gpus=(H100,), shm_bytes=2**26)
    assert "--shm-size" in only("warning", single)


def test_clocks_are_compared_beyond_what_the_look_itself_takes() -> None:
    assert said(replace(FIRST, skew_seconds=-1.5, skew_error_seconds=0.6)) == []
    assert "clock is -3.0 s from the driver's" in only("warning", replace(FIRST, skew_seconds=-3.0))


def test_what_keeps_a_node_from_training_is_told_with_its_name() -> None:
    assert "10.0.0.1 (a): there is no C++ compiler" in only("problem", replace(FIRST, compiler=False))
    storage = replace(FIRST, storage_problem="/mnt cannot be written (Read-only file system)")
    assert "the storage /mnt cannot be written" in only("problem", storage)
    assert "belongs to lo" in only("warning", replace(FIRST, interface="lo"), SECOND)
    assert said(replace(FIRST, interface="lo")) == []


def test_problems_come_first() -> None:
    found = said(replace(FIRST, skew_seconds=5.0, compiler=False))
    assert [finding.level for finding in found] == ["problem", "warning"]


def test_this_node_is_looked_at() -> None:
    found = preflight.inspect("127.0.0.1")
    assert found.node == "127.0.0.1"
    assert found.versions["python"].startswith("3.")  # type: ignore[union-attr]
    assert found.versions["torch"] is not None
    assert found.shm_bytes > 0
    assert found.interface in ("lo", None)


@pytest.mark.parametrize(
    ("answer", "gpus", "error"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 81559, 570.1'", (H100,), None),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", (), "Failed to init"),
    ],
)
def test_nvidia_smi_is_read(
    answer: str, gpus: tuple[Gpu, ...], error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = preflight.inspect("127.0.0.1")
    assert found.gpus == gpus
    assert (found.gpu_error or "").startswith(error or "")
    assert (found.gpu_error is None) == (error is None)


def test_marks_show_whether_storage_is_shared(tmp_path: Path) -> None:
    assert preflight.mark(tmp_path / "new", "t", "fe80::1") is None
    assert preflight.mark(tmp_path / "new", "t", "driver") is None
    assert preflight.missing_marks(tmp_path / "new", "t", ["fe80::1", "driver", "other"]) == ["other"]
    preflight.unmark(tmp_path / "new", "t", ["fe80::1", "driver", "other"])
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    preflight.unmark(tmp_path / "file" / "below", "t", ["a"])
    assert "cannot be written" in str(preflight.mark(tmp_path / "file" / "below", "t", "a"))
