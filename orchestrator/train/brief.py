"""What the driver hands to every worker: all paths and choices, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.data.loader import Geometry, PackLoader
from orchestrator.data.packing import Packs, best_fit, one_each
from orchestrator.data.store import TokenStore
from orchestrator.parallel.layout import Layout
from orchestrator.spec import JobSpec

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Brief:
    """The run as it was decided.

    Attributes:
        job: The job, with absolute paths.
        folder: The run's folder, on storage that every node sees.
        training: Folder of the tokenised training data.
        evaluation: Folder of the tokenised held-out data.
        dtype: Number format of the model.
        device: Kind of device.
        ds_config: The rendered DeepSpeed configuration.
    """

    job: JobSpec
    folder: Path
    training: Path
    evaluation: Path | None
    dtype: Literal["bf16", "fp16", "fp32"]
    device: Literal["cuda", "cpu"]
    ds_config: dict[str, Any]

    @property
    def layout(self) -> Layout:
        """Degrees of parallelism."""
        return Layout.of(self.job)

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / CHECKPOINTS


def pack(job: JobSpec, store: TokenStore) -> Packs:
    """Return the packs of a data set: the same on every machine, from the lengths and the seed."""
    if job.data.packing == "none":
        return one_each(store.lengths)
    return best_fit(store.lengths, job.data.max_length, job.run.seed)


def training_loader(job: JobSpec, store: TokenStore, packs: Packs) -> tuple[PackLoader, int, int]:
    """Return the loader of the training data, the packs of all steps together, and the steps."""
    optim, layout = job.optim, Layout.of(job)
    geometry = Geometry(
        job.data.max_length, optim.global_batch_size, optim.micro_batch_size, layout.data_parallel_size
    )
    loader = PackLoader(store, packs, geometry, job.run.seed)
    if optim.max_steps is not None:
        return loader, optim.max_steps * optim.global_batch_size, optim.max_steps
    return loader, loader.packs(optim.epochs), loader.steps(optim.epochs)


def evaluation_loader(job: JobSpec, store: TokenStore, packs: Packs) -> tuple[PackLoader, int]:
    """Return the loader of the held-out data, one micro-batch a worker and step, and the number of packs."""
    micro, layout = job.optim.micro_batch_size, Layout.of(job)
    geometry = Geometry(
        job.data.max_length, micro * layout.data_parallel_size, micro, layout.data_parallel_size
    )
    return PackLoader(store, packs, geometry, job.run.seed, shuffle=False), len(packs)
