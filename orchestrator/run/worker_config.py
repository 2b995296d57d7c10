"""The configuration that the driver hands to every worker, and the data loaders that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.arch.flops import forward_flops
from orchestrator.arch.model_dims import ModelDims
from orchestrator.config.auto_values import DeviceType, TrainDtype
from orchestrator.config.schema import JobSpec
from orchestrator.data.balance import BatchShape
from orchestrator.data.corpus import Documents
from orchestrator.data.loader import PackLoader, SamplerConfig
from orchestrator.data.packing import Packs
from orchestrator.model.build import load_config
from orchestrator.parallel.deepspeed_config import DeepSpeedConfig
from orchestrator.parallel.parallel_dims import ParallelDims

CHECKPOINTS = "checkpoints"
_ALLOCATOR = "PYTORCH_ALLOC_CONF"


@dataclass(frozen=True)
class BenchmarkRun:
    """A run that only measures: it saves no checkpoint and exports nothing.

    Attributes:
        memory_limit_bytes: Memory that each worker may allocate for training: of its device, and on CPU in
            addition to what its process uses before the model is built. None sets no limit.
    """

    memory_limit_bytes: int | None = None


@dataclass(frozen=True)
class WorkerConfig:
    """The resolved job and the paths of one run.

    Attributes:
        job: The job, with absolute paths.
        run_dir: The run directory, on storage that every node sees.
        training: Folder of the packed training data.
        evaluation: Folder of each packed evaluation set by name.
        dtype: Dtype of weights and activations.
        device: Device type.
        deepspeed_config: The rendered DeepSpeed configuration.
        worker_resources: Resources that Ray reserves for each worker.
        nvme_bytes: Bytes that each worker writes at most to its node's disk; 0 without offload to nvme.
        benchmark: Set for a run that only measures.
    """

    job: JobSpec
    run_dir: Path
    training: Path
    evaluation: Mapping[str, Path]
    dtype: TrainDtype
    device: DeviceType
    deepspeed_config: DeepSpeedConfig
    worker_resources: dict[str, float] = field(default_factory=dict)
    nvme_bytes: int = 0
    benchmark: BenchmarkRun | None = None

    @property
    def layout(self) -> ParallelDims:
        """Parallel dimensions."""
        return ParallelDims.from_job(self.job)

    @property
    def checkpoints(self) -> Path:
        """The checkpoints directory."""
        return self.run_dir / CHECKPOINTS

    def worker_environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Return the environment variables to add for workers, which the CUDA allocator reads at start."""
        if self.device == "cpu" or _ALLOCATOR in inherited:
            return {}  # the user has set allocator options
        return {_ALLOCATOR: f"expandable_segments:{self.job.parallel.expandable_segments}"}


def flops_per_slot(job: JobSpec) -> tuple[float, float]:
    """Return the FLOPs of one slot of a pack without attention, and of one squared token of a document.

    For an architecture whose shape is not known, those of a plain transformer of its hidden size: 24 h^2 and
    2 h a layer.
    """
    config = load_config(job.model).to_dict()
    shape = ModelDims.from_config(config)
    if shape is None:
        hidden = float(config.get("hidden_size") or 0)
        return (24.0 * hidden**2, 2.0 * hidden) if hidden else (1.0, 0.0)
    return forward_flops(shape, 1, 0, 0).linear, forward_flops(shape, 0, 1, 0).attention


def loader(
    job: JobSpec, documents: Documents, packs: Packs, global_batch_size: int, shuffle: bool
) -> PackLoader:
    """Return the loader of a packed dataset with `global_batch_size` packs in a step."""
    batch_shape = BatchShape(
        job.data.max_length,
        global_batch_size,
        job.optim.micro_batch_size,
        ParallelDims.from_job(job).data_parallel_size,
        sync_every_micro_step=job.parallel.zero_stage >= 2,
        sequence_parallel_size=job.parallel.sequence_parallel_size,
        pads_packs=job.data.pads_packs,
    )
    slot_cost, squared_length_cost = flops_per_slot(job)
    sampler = SamplerConfig(
        job.run.seed,
        shuffle,
        job.data.balance_window_steps,
        slot_cost,
        squared_length_cost,
        job.data.cross_document_attention,
    )
    return PackLoader(documents, packs, batch_shape, sampler)


def training_loader(job: JobSpec, documents: Documents, packs: Packs) -> tuple[PackLoader, int, int]:
    """Return the training loader, the number of packs of all steps, and the number of steps."""
    optim = job.optim
    batches = loader(job, documents, packs, optim.global_batch_size, shuffle=True)
    return batches, optim.packs(len(packs)), optim.steps(len(packs))


def evaluation_loader(job: JobSpec, documents: Documents, packs: Packs) -> tuple[PackLoader, int]:
    """Return the evaluation loader, with one micro-batch per worker and step, and the number of packs."""
    at_once = job.optim.micro_batch_size * ParallelDims.from_job(job).data_parallel_size
    return loader(job, documents, packs, at_once, shuffle=False), len(packs)
