"""Parses the cluster to plan for from a specification such as ``4x8xA100-80G-SXM``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.cluster.hardware import Device, device

if TYPE_CHECKING:
    from pathlib import Path

MAX_WORKERS = 65_536
"""Maximum number of devices: more than a job file accepts; search time grows with it."""
_FORM = re.compile(r"(?:(?:(?P<nodes>\d{1,18})x)?(?P<each>\d{1,18})x)?(?P<device>[^x\d].*)")


class ClusterSpecError(ValueError):
    """A cluster specification is malformed or has too many devices."""


@dataclass(frozen=True)
class ClusterSpec:
    """A homogeneous cluster.

    Attributes:
        nodes: Number of nodes.
        gpus_per_node: Devices per node.
        device: Device model.
    """

    nodes: int
    gpus_per_node: int
    device: Device

    @classmethod
    def parse(cls, text: str, extra: Path | None = None) -> ClusterSpec:
        """Parse a cluster specification.

        Args:
            text: ``NODESxGPUSxDEVICE``, ``GPUSxDEVICE`` for one node, or ``DEVICE`` for one GPU.
            extra: Catalogue file to use in addition to the built-in one.

        Raises:
            ClusterSpecError: The text is malformed, or has no devices or more than MAX_WORKERS.
            UnknownDevice: The device is in no catalogue.
            CatalogueError: A catalogue cannot be read.
        """
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise ClusterSpecError(
                f"{text!r} names no machines; write NODESxGPUSxDEVICE, such as 4x8xA100-80G-SXM, or 8xDEVICE "
                "for one node"
            )
        nodes, each = int(found["nodes"] or 1), int(found["each"] or 1)
        if not 1 <= nodes * each <= MAX_WORKERS:
            raise ClusterSpecError(
                f"{text!r} names {nodes * each:,} devices; write NODESxGPUSxDEVICE with at least 1 "
                f"and at most {MAX_WORKERS:,} devices"
            )
        return cls(nodes, each, device(found["device"], extra))

    def with_network(self, gbit_per_second: float) -> ClusterSpec:
        """Return a copy with a different network bandwidth.

        Args:
            gbit_per_second: Total bandwidth of a node's network cards, in one direction.
        """
        each = gbit_per_second / 8 / self.gpus_per_node
        return replace(self, device=self.device.model_copy(update={"network_gb_per_second": each}))

    @property
    def gpus(self) -> int:
        """Total number of devices."""
        return self.nodes * self.gpus_per_node

    @property
    def host_bytes_per_node(self) -> float | None:
        """Host memory of a node in bytes; None if the catalogue does not list it."""
        each = self.device.host_memory_gib
        return None if each is None else each * self.gpus_per_node * 2**30

    def __str__(self) -> str:
        """Return the specification, as `parse` accepts it."""
        return f"{self.nodes}x{self.gpus_per_node}x{self.device.name}"
