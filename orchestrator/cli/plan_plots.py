"""Plots of a plan over max_length: memory by part, and TGS with its range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.bench.plots import require_matplotlib
from orchestrator.cluster.cluster_spec import ClusterSpec
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.planner.estimate import TIME_RANGE, CalibrationParams
from orchestrator.planner.formatting import GIB
from orchestrator.planner.plan import Candidate
from orchestrator.planner.search import search
from orchestrator.planner.workload import UNKNOWN_DATA, DataShape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHORTEST = 512
_CREATOR = "orchestrator plan --plots"
_PARTS = {
    "weights": "#0072B2", "gradients": "#56B4E9", "optimizer": "#009E73", "gathered_params": "#E69F00",
    "buffers": "#F0E442", "context": "#999999", "activations": "#CC79A7", "the largest moment": "#D55E00",
}  # fmt: skip


def draw(
    job: JobSpec,
    config: Mapping[str, object],
    cluster: ClusterSpec,
    calibration: CalibrationParams,
    folder: Path,
    data: DataShape = UNKNOWN_DATA,
) -> list[Path]:
    """Write memory_by_part.svg and tgs_over_length.svg with the best plan at several lengths.

    Args:
        job: The job; its max_length is plotted with multiples from 1/8 to 8 by powers of two.
        config: The model's config.json.
        cluster: The cluster to plan for.
        calibration: Calibration parameters of the software stack.
        folder: Folder for the files.
        data: Statistics of the data.

    Raises:
        SpecError: matplotlib is not installed, the folder is not writable, or it has files of the same names
            that this command did not write.
    """
    require_matplotlib("leave out --plots")
    files = [folder / f"{name}.svg" for name in ("memory_by_part", "tgs_over_length")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _require_ours(files)
    except OSError as error:
        raise _unwritable(folder, error) from None
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    own = job.data.max_length
    lengths = [length for length in (own * 2**power // 8 for power in range(7)) if length >= _SHORTEST]
    planned = {}
    for length in lengths:
        other = job.model_copy(update={"data": job.data.model_copy(update={"max_length": length})})
        best = search(other, config, cluster, calibration, data).best
        if best is not None:
            planned[length] = best
    title = f"{job.model.path} on {cluster}, {job.optim.global_batch_size} packs a step"
    for file, paint in zip(files, (_memory, _tgs), strict=True):
        figure, axes = pyplot.subplots(figsize=(8.0, 4.6), layout="constrained")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        paint(axes, planned, cluster)
        axes.set_xticks(range(len(planned)), [f"{length:,}" for length in planned])
        axes.set_xlabel("max_length" + ("; longer ones do not fit" if len(planned) < len(lengths) else ""))
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium", fontweight="bold")
        try:
            figure.savefig(file, metadata={"Date": None, "Creator": _CREATOR})
        except OSError as error:
            raise _unwritable(folder, error) from None
        pyplot.close(figure)
    return files


def _unwritable(folder: Path, error: OSError) -> SpecError:
    return SpecError(
        f"--plots {folder} cannot be written ({error.strerror or error}); name a folder that can be"
    )


def _require_ours(files: Sequence[Path]) -> None:
    """Raise SpecError if a file exists without this command's name in its SVG metadata."""
    foreign = [file for file in files if file.exists() and _CREATOR.encode() not in file.read_bytes()]
    if foreign:
        names = ", ".join(str(file) for file in foreign)
        raise SpecError(
            f"--plots would overwrite {names}, which this command did not draw; name another folder"
        )


def moments(candidate: Candidate) -> dict[str, float]:
    """Return the components of the required memory in GiB: states and the largest of three phases."""
    found = candidate.prediction.memory
    parts = {
        name: getattr(found, name)
        for name in ("weights", "gradients", "optimizer", "gathered_params", "buffers", "context")
    }
    backward = found.layer + found.quantization
    if found.step_peak >= max(found.loss_peak, found.backward_peak):
        parts["the largest moment"] = found.step
    else:
        parts["activations"] = found.activations
        parts["the largest moment"] = max(found.logits, backward)
    return {name: size / GIB for name, size in parts.items()}


def _memory(axes: Axes, planned: Mapping[int, Candidate], cluster: ClusterSpec) -> None:
    bottoms = [0.0] * len(planned)
    stacks = [moments(each) for each in planned.values()]
    for name, colour in _PARTS.items():
        sizes = [stack.get(name, 0.0) for stack in stacks]
        axes.bar(range(len(sizes)), sizes, bottom=bottoms, color=colour, label=name, width=0.7)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    axes.axhline(cluster.device.memory_gib, color="#333333", linestyle="--", linewidth=1)
    axes.text(-0.4, cluster.device.memory_gib, "the device's", va="bottom", fontsize="small")
    axes.set_ylabel("GiB required on a GPU")
    axes.legend(frameon=False, fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _tgs(axes: Axes, planned: Mapping[int, Candidate], cluster: ClusterSpec) -> None:
    rates = [each.prediction.tgs or 0.0 for each in planned.values()]
    off = TIME_RANGE[any(each.prediction.calibrated for each in planned.values())]
    places = range(len(rates))
    axes.fill_between(
        places,
        [rate / (1 + off) for rate in rates],
        [rate / (1 - off) for rate in rates],
        color="#56B4E9",
        alpha=0.3,
    )
    axes.plot(places, rates, color="#0072B2", marker="o")
    for place, each in zip(places, planned.values(), strict=True):
        parallel = each.job.parallel
        label = f"ZeRO-{parallel.zero_stage}, sp {parallel.sequence_parallel_size}"
        axes.annotate(
            label,
            (place, rates[place]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize="small",
        )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("TGS, tokens a GPU and second")
