"""Text output of `orchestrator doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.cluster.preflight import NodeInfo
    from orchestrator.train.doctor import ClusterReport


def format_report(report: ClusterReport) -> str:
    """Return one line per node, one for the all-reduce, and the warnings."""
    lines = [_format_node(node) for node in report.nodes]
    if report.all_reduce and report.all_reduce.seconds:
        measured = report.all_reduce
        size, bandwidth = measured.size_bytes / 2**20, measured.bus_gigabytes_per_second
        lines.append(
            f"all-reduce of {size:.0f} MiB over {measured.ranks} ranks ({measured.backend}): "
            f"{1e3 * report.all_reduce.seconds:.1f} ms, {bandwidth:.2f} GB/s bus bandwidth"
        )
    lines += [f"warning: {diag.sentence}" for diag in report.diagnostics if diag.level == "warning"]
    return "\n".join([*lines, "" if has_problem(report) else "ready"]).rstrip()


def has_problem(report: ClusterReport) -> bool:
    """Return whether any diagnostic prevents training."""
    return any(diag.level == "problem" for diag in report.diagnostics)


def _format_node(node: NodeInfo) -> str:
    gpus = f"{len(node.gpus)} x {node.gpus[0].name}, driver {node.gpus[0].driver}" if node.gpus else "no GPU"
    speed = f" at {node.interface_megabits / 1000:g} Gbit/s" if node.interface_megabits else ""
    skew = ""
    if node.skew_seconds is not None:
        skew = f", clock {1e3 * node.skew_seconds:+.0f} ms"
    return (
        f"{node.node} ({node.hostname}): {gpus}, /dev/shm {node.shm_bytes / 2**30:.1f} GiB, "
        f"interface {node.interface or 'unknown'}{speed}{skew}, torch {node.versions.get('torch')}, "
        f"deepspeed {node.versions.get('deepspeed')}, ray {node.versions.get('ray')}"
    )
