"""What `orchestrator doctor` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.cluster.preflight import Found
    from orchestrator.train.doctor import Examination


def in_words(found: Examination) -> str:
    """Return a line for each node, one for the all-reduce, and the warnings."""
    lines = [_node(node) for node in found.nodes]
    if found.all_reduce and found.all_reduce.seconds:
        measured = found.all_reduce
        size, bandwidth = measured.size_bytes / 2**20, measured.bus_gigabytes_per_second
        lines.append(
            f"all-reduce of {size:.0f} MiB over {measured.ranks} ranks ({measured.backend}): "
            f"{1e3 * found.all_reduce.seconds:.1f} ms, {bandwidth:.2f} GB/s bus bandwidth"
        )
    lines += [f"warning: {each.sentence}" for each in found.findings if each.level == "warning"]
    return "\n".join([*lines, "" if any_problem(found) else "ready"]).rstrip()


def any_problem(found: Examination) -> bool:
    """Tell whether training would not work."""
    return any(each.level == "problem" for each in found.findings)


def _node(node: Found) -> str:
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
