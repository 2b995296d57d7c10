"""Node information, and the problems and warnings derived from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster import preflight
from orchestrator.cluster.preflight import PACKAGES, Diagnostic, Gpu, NodeInfo, diagnose

H100 = Gpu("NVIDIA H100 80GB HBM3", 81559, "570.1")
VERSIONS = {"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")}
FIRST = NodeInfo(
    "10.0.0.1", "a", (H100,) * 8, shm_bytes=2**34, interface="eth0", compiler=True, versions=VERSIONS,
    skew_seconds=0.001,
)  # fmt: skip
SECOND = replace(FIRST, node="10.0.0.2", hostname="b")


def diagnostics_of(*nodes: NodeInfo, expect_gpus: bool = True) -> list[Diagnostic]:
    return diagnose(nodes, expect_gpus)


def only(level: str, *nodes: NodeInfo, expect_gpus: bool = True) -> str:
    (diagnostic,) = diagnostics_of(*nodes, expect_gpus=expect_gpus)
    assert diagnostic.level == level
    return diagnostic.sentence


def test_identical_nodes_have_no_diagnostics() -> None:
    assert diagnostics_of(FIRST, SECOND) == []
    assert diagnostics_of(replace(FIRST, gpus=()), expect_gpus=False) == []


def test_differing_versions_are_a_problem() -> None:
    other = replace(SECOND, versions={**VERSIONS, "torch": "1.1"})
    sentence = only("problem", FIRST, other)
    assert "torch differs between nodes (1.0 on 10.0.0.1, 1.1 on 10.0.0.2)" in sentence
    missing = replace(SECOND, versions={**VERSIONS, "peft": None})
    assert "peft differs between nodes (1.0 on 10.0.0.1, none on 10.0.0.2)" in only("problem", FIRST, missing)


def test_a_missing_package_is_a_problem_unless_submit_uploads_it() -> None:
    without = [replace(info, versions={**VERSIONS, "deepspeed": None}) for info in (FIRST, SECOND)]
    assert "deepspeed is installed on no node" in only("problem", *without)
    submitted = [replace(info, versions={**VERSIONS, PACKAGES[-1]: None}) for info in (FIRST, SECOND)]
    assert diagnostics_of(*submitted) == []


def test_differing_gpu_models_drivers_and_counts_are_warnings() -> None:
    a100 = replace(H100, name="NVIDIA A100-SXM4-80GB", driver="550.2")
    sentences = [
        diagnostic.sentence for diagnostic in diagnostics_of(FIRST, replace(SECOND, gpus=(a100,) * 4))
    ]
    assert len(sentences) == 3
    assert "GPU models differ (NVIDIA A100-SXM4-80GB, NVIDIA H100 80GB HBM3)" in sentences[0]
    assert "GPU drivers differ (550.2, 570.1)" in sentences[1]
    assert "different numbers of GPUs (8 on 10.0.0.1, 4 on 10.0.0.2)" in sentences[2]


def test_a_gpu_cluster_without_visible_gpus_is_a_problem() -> None:
    bare = replace(FIRST, gpus=())
    assert "nvidia-smi lists no GPU on any node" in only("problem", bare)
    broken = replace(bare, gpu_error="driver mismatch")
    sentence = only("problem", broken, expect_gpus=False)
    assert sentence == "10.0.0.1 (a): nvidia-smi fails (driver mismatch); check the driver"


def test_small_shm_is_a_problem_with_several_gpus_and_a_warning_with_one() -> None:
    assert "/dev/shm has 64 MiB, and NCCL and Ray need 8192 MiB" in only(
        "problem", replace(FIRST, shm_bytes=2**26)
    )
    single = replace(FIRST, gpus=(H100,), shm_bytes=2**26)
    assert "--shm-size" in only("warning", single)


def test_clock_skew_is_reported_beyond_its_measurement_error() -> None:
    assert diagnostics_of(replace(FIRST, skew_seconds=-1.5, skew_error_seconds=0.6)) == []
    assert "clock is -3.0 s from the driver's" in only("warning", replace(FIRST, skew_seconds=-3.0))


def test_node_diagnostics_name_the_node() -> None:
    assert "10.0.0.1 (a): no C++ compiler found" in only("problem", replace(FIRST, compiler=False))
    storage = replace(FIRST, storage_problem="/mnt cannot be written (Read-only file system)")
    assert "storage /mnt cannot be written" in only("problem", storage)
    assert "belongs to lo" in only("warning", replace(FIRST, interface="lo"), SECOND)
    assert diagnostics_of(replace(FIRST, interface="lo")) == []


def test_problems_come_first() -> None:
    diagnostics = diagnostics_of(replace(FIRST, skew_seconds=5.0, compiler=False))
    assert [diagnostic.level for diagnostic in diagnostics] == ["problem", "warning"]


def test_node_info_of_this_machine() -> None:
    info = preflight.collect_node_info("127.0.0.1")
    assert info.node == "127.0.0.1"
    assert info.versions["python"].startswith("3.")  # type: ignore[union-attr]
    assert info.versions["torch"] is not None
    assert info.shm_bytes > 0
    assert info.interface in ("lo", None)


@pytest.mark.parametrize(
    ("answer", "gpus", "error"),
    [
        ("echo 'NVIDIA H100 80GB HBM3, 81559, 570.1'", (H100,), None),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", (), "Failed to init"),
    ],
)
def test_nvidia_smi_output_is_parsed(
    answer: str, gpus: tuple[Gpu, ...], error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    info = preflight.collect_node_info("127.0.0.1")
    assert info.gpus == gpus
    assert (info.gpu_error or "").startswith(error or "")
    assert (info.gpu_error is None) == (error is None)


def test_markers_show_whether_storage_is_shared(tmp_path: Path) -> None:
    assert preflight.write_marker(tmp_path / "new", "t", "fe80::1") is None
    assert preflight.write_marker(tmp_path / "new", "t", "driver") is None
    assert preflight.missing_markers(tmp_path / "new", "t", ["fe80::1", "driver", "other"]) == ["other"]
    preflight.remove_markers(tmp_path / "new", "t", ["fe80::1", "driver", "other"])
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    preflight.remove_markers(tmp_path / "file" / "below", "t", ["a"])
    assert "cannot be written" in str(preflight.write_marker(tmp_path / "file" / "below", "t", "a"))
