"""What `orchestrator render` prints."""

from __future__ import annotations

import json
from typing import Literal

from orchestrator.config.auto_values import resolve_device, resolve_dtype
from orchestrator.config.schema import JobSpec
from orchestrator.errors import SpecError
from orchestrator.kubernetes.pod_sizing import PodOptions


def rendered(
    job: JobSpec,
    target: Literal["deepspeed", "rayjob"],
    device: Literal["cuda", "cpu"] | None,
    options: PodOptions,
) -> str:
    """Return the DeepSpeed configuration or the RayJob manifest of a job.

    Args:
        job: The job.
        target: Output.
        device: Device type if the job has `device: auto`; None assumes GPUs.
        options: Options of the manifest; the DeepSpeed configuration takes none.

    Raises:
        SpecError: The job or an option does not fit the target.
    """
    kind = device or resolve_device(job.parallel.device, has_gpus=True)
    if target == "rayjob":
        from orchestrator.kubernetes.rayjob import manifest

        return manifest(job, options, kind).rstrip("\n")
    if options != PodOptions():
        raise SpecError(f"options for pods and nodes require --target rayjob (got --target {target})")
    from orchestrator.parallel.deepspeed_config import render as render_deepspeed

    dtype = resolve_dtype(job.model.dtype, kind)
    return json.dumps(render_deepspeed(job, dtype, kind), indent=2)
