"""The hardware catalogue: what one accelerator can hold and how fast it can go.

The numbers live in ``catalogue.toml`` beside this file. A device that is not listed there is unknown: nothing
is guessed from a similar name, because a wrong peak makes every MFU derived from it wrong.
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
    """A catalogue file cannot be read or describes a device wrongly."""


class UnknownDevice(ValueError):
    """A device name is not in the catalogue."""


class PeakTflops(BaseModel):
    """Dense peak rates of a device in 10^12 operations a second; None where it has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bf16: PositiveFloat | None = None
    fp16: PositiveFloat | None = None
    tf32: PositiveFloat | None = None
    fp32: PositiveFloat | None = None


class ReachedTflops(BaseModel):
    """What others measured a device to reach in bf16, in 10^12 operations a second; None where nobody has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matmul: PositiveFloat | None = None
    flash_attention: PositiveFloat | None = None


class Device(BaseModel):
    """One accelerator of the catalogue.

    Attributes:
        name: The catalogue's name, such as ``H100-80G-SXM``.
        memory_gib: Memory that a process can see, in GiB.
        memory_bandwidth_gb_per_second: Bandwidth of the device memory in 10^9 bytes a second.
        interconnect: The fastest link between devices of one node.
        interconnect_gb_per_second: Bandwidth of that link, both directions added, in 10^9 bytes a second.
        host_link_gb_per_second: Bandwidth to the host's memory, both directions added.
        network_gb_per_second: Bandwidth between nodes for each device, in one direction.
        host_memory_gib: Share of a node's memory for each device.
        system: The machine that network and host memory are read from.
        cuda_names: Whole names as CUDA reports them.
        peak_tflops: Dense peak rates by data type.
        reached_tflops: What is reached of the peak in bf16: power and kernels differ by device.
        source: The data sheet the numbers come from.
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
    reached_tflops: ReachedTflops = ReachedTflops()
    source: str

    @property
    def memory_bytes(self) -> int:
        """Memory that a process can see, in bytes."""
        return int(self.memory_gib * 2**30)

    @property
    def is_processor(self) -> bool:
        """Whether it stands for workers on a CPU, whose memory is their node's."""
        return self.name == "cpu"

    def peak_flops(self, dtype: str) -> float | None:
        """Return the dense peak rate for a data type in operations a second.

        Args:
            dtype: ``bf16``, ``fp16``, ``tf32`` (fp32 data on tensor cores) or ``fp32`` (no tensor cores).

        Returns:
            Operations a second, or None where the catalogue has no peak: MFU is then absent, never estimated.
        """
        tflops: float | None = self.peak_tflops.model_dump().get(dtype)
        return None if tflops is None else tflops * 1e12

    def reached_share(self, kernel: Literal["matmul", "flash_attention"]) -> float | None:
        """Return the share of the bf16 peak that a kernel was measured to reach; None where none was."""
        reached: float | None = self.reached_tflops.model_dump()[kernel]
        peak = self.peak_tflops.bf16
        return None if reached is None or peak is None else reached / peak


def catalogue(extra: Path | None = None) -> dict[str, Device]:
    """Return every known device by name.

    Args:
        extra: A TOML file of the same form as ``catalogue.toml``; its devices are added, and replace those of
            the same name.

    Raises:
        CatalogueError: A file cannot be read, is not TOML, or has a wrong or missing field.
    """
    return {**_builtin(), **(_read(extra) if extra is not None else {})}


def device(name: str, extra: Path | None = None) -> Device:
    """Return the device with a catalogue name.

    Args:
        name: Such as ``A100-80G-SXM``; case matters.
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
        f" similar device into a TOML file of your own, put in the numbers of its data sheet (dense ones),"
        f" and pass that file with --catalogue"
    )


def match(cuda_name: str, extra: Path | None = None) -> Device | None:
    """Return the device that reports a CUDA name, or None when no entry lists exactly this name.

    Whole names are compared, so that "RTX 4090 D", "H100 NVL" or a MIG slice, which have other peaks, are not
    taken for their relatives.

    Args:
        cuda_name: As ``torch.cuda.get_device_name`` returns it.
        extra: As for `catalogue`; its entries are looked at first.

    Raises:
        CatalogueError: As for `catalogue`.
    """
    wanted = _normal(cuda_name)
    for entry in reversed(catalogue(extra).values()):
        if wanted in map(_normal, entry.cuda_names):
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
            f"hardware catalogue {path}: {name} is a value, not a table; write [{name}] and its fields"
        )
    try:
        return Device.model_validate({**table, "name": name})
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CatalogueError(
            f"hardware catalogue {path}, device {name}: {wrong}; the fields are those of {CATALOGUE.name}"
        ) from error
