"""Clusters by their short names."""

from __future__ import annotations

import pytest

from orchestrator.cluster.cluster_spec import ClusterSpec, ClusterSpecError
from orchestrator.cluster.hardware import UnknownDevice


@pytest.mark.parametrize(
    ("text", "nodes", "each"),
    [
        ("4x8xA100-80G-SXM", 4, 8),
        ("8xA100-80G-SXM", 1, 8),
        ("A100-80G-SXM", 1, 1),
        ("1250x8xH100-80G-SXM", 1250, 8),
    ],
)
def test_nodes_and_gpus_are_read(text: str, nodes: int, each: int) -> None:
    found = ClusterSpec.parse(text)
    assert (found.nodes, found.gpus_per_node, found.gpus) == (nodes, each, nodes * each)
    assert ClusterSpec.parse(str(found)) == found


def test_a_node_has_the_memory_of_its_devices_together() -> None:
    found = ClusterSpec.parse("2x8xA100-80G-SXM")
    assert found.host_bytes_per_node == 8 * (found.device.host_memory_gib or 0) * 2**30 > 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "8x",
        "0x8xA100-80G-SXM",
        "4x0xA100-80G-SXM",
        "-1xA100-80G-SXM",
        "2x2x2xL40S-48G",
        "9" * 5000 + "xL40S-48G",
    ],
)
def test_another_form_is_an_error_that_shows_the_form(text: str) -> None:
    with pytest.raises((ClusterSpecError, UnknownDevice), match=r"NODESxGPUSxDEVICE|use one of"):
        ClusterSpec.parse(text)


@pytest.mark.parametrize("text", ["99999999999xL40S-48G", "65536x2xL40S-48G", "00xL40S-48G"])
def test_a_number_of_devices_that_nobody_has_is_refused(text: str) -> None:
    with pytest.raises(ClusterSpecError, match=r"devices; write .* at most 65,536"):
        ClusterSpec.parse(text)


def test_an_unknown_device_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UnknownDevice, match=r"A100-80G-SXM.*H100-80G-SXM"):
        ClusterSpec.parse("8xA1000")
