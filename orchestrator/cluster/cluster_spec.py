"""The machines that a plan is made for, named by a short text such as ``4x8xA100-80G-SXM``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from orchestrator.cluster.hardware import Device, device

if TYPE_CHECKING:
    from pathlib import Path

MAX_WORKERS = 65_536
"""More devices than any job file may ask for; the search for a plan grows with their number."""
_FORM = re.compile(r"(?:(?:(?P<nodes>\d{1,18})x)?(?P<each>\d{1,18})x)?(?P<device>[^x\d].*)")


class ClusterSpecError(ValueError):
    """A text names no machines."""


@dataclass(frozen=True)
class ClusterSpec:
    """Nodes that are all alike.

    Attributes:
        nodes: How many there are.
        gpus_per_node: Devices of each.
        device: The device.
    """

    nodes: int
    gpus_per_node: int
    device: Device

    @classmethod
    def parse(cls, text: str, extra: Path | None = None) -> ClusterSpec:
        """Return the machines that a text names.

        Args:
            text: ``NODESxGPUSxDEVICE``, ``GPUSxDEVICE`` for one node, or ``DEVICE`` for one GPU.
            extra: A catalogue of the user's own, beside the one that ships.

        Raises:
            ClusterSpecError: The text has another form, or names no device or more than MAX_WORKERS.
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
        """Return the same with another network than the catalogue's.

        Args:
            gbit_per_second: Of a whole node, in one direction: what its network cards add up to.
        """
        each = gbit_per_second / 8 / self.gpus_per_node
        return replace(self, device=self.device.model_copy(update={"network_gb_per_second": each}))

    @property
    def gpus(self) -> int:
        """Devices of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def host_bytes_per_node(self) -> float | None:
        """Main memory of a node; None where the catalogue does not say."""
        each = self.device.host_memory_gib
        return None if each is None else each * self.gpus_per_node * 2**30

    def __str__(self) -> str:
        """Return the text that names them."""
        return f"{self.nodes}x{self.gpus_per_node}x{self.device.name}"
