"""The hardware catalogue: memory, bandwidths and peak FLOP/s of accelerators.

The numbers are in ``cluster/catalogue.toml``. A device that is not listed there is unknown: nothing is
inferred from a similar name, because a wrong peak makes every MFU derived from it wrong.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError

from orchestrator.package_data import resource

if TYPE_CHECKING:
    from collections.abc import Mapping

CATALOGUE = resource("cluster/catalogue.toml")


class CatalogueError(ValueError):
    """A catalogue file cannot be read or has an invalid entry."""


class UnknownDevice(ValueError):
    """A device name is not in the catalogue."""


class PeakTflops(BaseModel):
    """Dense peak rates of a device in 10^12 FLOP/s; None for an unsupported dtype."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bf16: PositiveFloat | None = None
    fp16: PositiveFloat | None = None
    tf32: PositiveFloat | None = None
    fp32: PositiveFloat | None = None


class AchievedTflops(BaseModel):
    """Published measurements of achieved bf16 rates in 10^12 FLOP/s; None if there are none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matmul: PositiveFloat | None = None
    flash_attention: PositiveFloat | None = None


class Device(BaseModel):
    """One accelerator of the catalogue.

    Attributes:
        name: Catalogue name, such as ``H100-80G-SXM``.
        memory_gib: Memory visible to a process, in GiB.
        memory_bandwidth_gb_per_second: Bandwidth of the device memory in 10^9 bytes/s.
        interconnect: Fastest link between devices of one node.
        interconnect_gb_per_second: Bandwidth of that link in 10^9 bytes/s, sum of both directions.
        host_link_gb_per_second: Bandwidth to host memory in 10^9 bytes/s, sum of both directions.
        network_gb_per_second: Inter-node bandwidth per device in 10^9 bytes/s, one direction.
        host_memory_gib: Node memory per device, in GiB.
        system: Reference machine for network and host memory.
        cuda_names: Device names as reported by CUDA.
        peak_tflops: Dense peak rates by dtype.
        achieved_tflops: Measured bf16 rates, limited by power and kernels.
        source: Data sheet of the numbers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory_gib: PositiveFloat
    memory_bandwidth_gb_per_second: PositiveFloat | None = None
    interconnect: Literal["nvlink", "pcie"] | None = None
    interconnect_gb_per_second: PositiveFloat | None = None
    host_link_gb_per_second: PositiveFloat | None = None
    network_gb_per_second: PositiveFloat | None = None
    host_memory_gib: PositiveFloat | None = None
    system: str = ""
    cuda_names: tuple[str, ...] = ()
    peak_tflops: PeakTflops = PeakTflops()
    achieved_tflops: AchievedTflops = AchievedTflops()
    source: str

    @property
    def memory_bytes(self) -> int:
        """Memory visible to a process, in bytes."""
        return int(self.memory_gib * 2**30)

    @property
    def is_cpu(self) -> bool:
        """Whether the device is a CPU worker, which uses host memory."""
        return self.name == "cpu"

    def peak_flops(self, dtype: str) -> float | None:
        """Return the dense peak rate of a dtype in FLOP/s.

        Args:
            dtype: ``bf16``, ``fp16``, ``tf32`` (fp32 data on tensor cores) or ``fp32`` (no tensor cores).

        Returns:
            FLOP/s, or None if the catalogue has no peak; MFU is then not reported.
        """
        tflops: float | None = self.peak_tflops.model_dump().get(dtype)
        return None if tflops is None else tflops * 1e12

    def achieved_fraction(self, kernel: Literal["matmul", "flash_attention"]) -> float | None:
        """Return the fraction of the bf16 peak that a kernel achieves; None if it was not measured."""
        achieved: float | None = self.achieved_tflops.model_dump()[kernel]
        peak = self.peak_tflops.bf16
        return None if achieved is None or peak is None else achieved / peak


def catalogue(extra: Path | None = None) -> dict[str, Device]:
    """Return all known devices by name.

    Args:
        extra: A TOML file in the format of ``catalogue.toml``; its devices are added and override those with
            the same name.

    Raises:
        CatalogueError: A file cannot be read, is not valid TOML, or has an invalid or missing field.
    """
    return {**_builtin(), **(_read(extra) if extra is not None else {})}


def device(name: str, extra: Path | None = None) -> Device:
    """Look up a device by its catalogue name.

    Args:
        name: Such as ``A100-80G-SXM``; case-sensitive.
        extra: As for `catalogue`.

    Raises:
        UnknownDevice: The name is not in the catalogue.
        CatalogueError: As for `catalogue`.
    """
    known = catalogue(extra)
    if name in known:
        return known[name]
    where = f"{CATALOGUE.name} and {extra}" if extra is not None else CATALOGUE.name
    raise UnknownDevice(
        f"device {name!r} is not in {where}; use one of {', '.join(known)}, or add it: copy the table of a"
        f" similar device into a TOML file, enter the dense rates of its data sheet, and pass the file with"
        f" --catalogue"
    )


def match(cuda_name: str, extra: Path | None = None) -> Device | None:
    """Return the device with exactly this CUDA name, or None.

    Prefixes do not match: "RTX 4090 D", "H100 NVL" and MIG slices have other peaks than the devices they are
    named after.

    Args:
        cuda_name: As ``torch.cuda.get_device_name`` returns it.
        extra: As for `catalogue`; its entries take precedence.

    Raises:
        CatalogueError: As for `catalogue`.
    """
    normalized = _normal(cuda_name)
    for entry in reversed(catalogue(extra).values()):
        if normalized in map(_normal, entry.cuda_names):
            return entry
    return None


def _normal(cuda_name: str) -> str:
    # Drivers before 470 print the name without the vendor.
    return " ".join(cuda_name.split()).casefold().removeprefix("nvidia ")


@cache
def _builtin() -> Mapping[str, Device]:
    return MappingProxyType(_read(CATALOGUE))


def _read(path: Path) -> dict[str, Device]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogueError(f"hardware catalogue {path} cannot be read: {error}") from error
    return {name: _entry(path, name, table) for name, table in tables.items()}


def _entry(path: Path, name: str, table: object) -> Device:
    if not isinstance(table, dict):
        raise CatalogueError(
            f"hardware catalogue {path}: {name} must be a table; write [{name}] followed by its fields"
        )
    try:
        return Device.model_validate({**table, "name": name})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CatalogueError(
            f"hardware catalogue {path}, device {name}: {wrong}; use the fields of {CATALOGUE.name}"
        ) from error
