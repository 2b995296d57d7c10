"""A worker of a process group: runs the tasks of tasks.json one after another, each with a new engine.

`group.run_group` starts it as `python -m tests.invariant.worker FOLDER`.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from orchestrator.checkpoint import checkpointer
from orchestrator.checkpoint.hashed_file import HashingWriter
from orchestrator.config.schema import JobSpec
from orchestrator.engine.deepspeed_engine import join_process_group, start_engine
from orchestrator.errors import SpecError, TrainingError
from orchestrator.model.build import build_model, torch_dtype
from orchestrator.model.loss import TiledHead
from orchestrator.parallel import ulysses
from orchestrator.parallel.deepspeed_config import render
from orchestrator.parallel.parallel_dims import ParallelDims
from orchestrator.run.worker_config import evaluation_loader, training_loader
from orchestrator.train.loop import StepReport, TrainContext, train
from tests.invariant import probe
from tests.invariant.material import planned

Task = dict[str, Any]
Answer = tuple[dict[str, Any], dict[str, Any]]


class _End(Exception):
    """Raised to interrupt training in the middle of a run, like the loss of a machine."""


class _Recorder:
    """A callback that records steps and evaluations, and saves checkpoints if the task has `save_to`."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[list[float]] = []

    stop_requested = False

    def on_step_end(self, report: StepReport) -> None:
        self.steps.append(
            {
                "step": report.step,
                "epoch": report.epoch,
                "loss": report.loss,
                "gradient_norm": report.gradient_norm,
                "learning_rate": report.learning_rate,
                "skipped": report.skipped,
                "tokens": [rank.tokens for rank in report.ranks],
                "trained_tokens": [rank.trained_tokens for rank in report.ranks],
            }
        )

    def on_evaluate(self, step: int, loss: float, by_set: Mapping[str, float]) -> None:
        self.evaluations.append([step, loss])

    def on_save(self, engine: Any, step: int) -> None:
        if "save_to" in self._task:
            checkpointer.save(engine, Path(self._task["save_to"]), step, 1, lambda: None)
        if step == self._task.get("end_at"):
            raise _End


def job_of(task: Task) -> JobSpec:
    return JobSpec.model_validate_json(json.dumps(task["job"]))


def engine_of(task: Task, load_weights: bool = True) -> Any:
    job, dtype = job_of(task), task.get("dtype", "fp32")
    if dtype == "fp16":
        _allow_fp16()
    ds_config = render(job, dtype, "cpu")
    if job.optim.optimizer == "muon":
        _choose_newton_schulz_dtype(task.get("newton_schulz", "bf16"))
    ds_config["fp16"].update(task.get("fp16", {}))
    # By default ZeRO-3 keeps parameters below a threshold on every rank; all parameters here are below it.
    if job.parallel.zero_stage == 3:
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    ds_config["zero_optimization"].update(task.get("zero_optimization", {}))
    ds_config["zero_optimization"].get("offload_param", {}).update(task.get("offload_param", {}))
    return start_engine(build_model(job, torch_dtype(dtype), ds_config, load_weights), ds_config)


def _allow_fp16() -> None:
    """Enable fp16 in DeepSpeed's CPU accelerator, which offers it only on CPUs with fast oneDNN support."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float, torch.half, torch.bfloat16]


def _choose_newton_schulz_dtype(dtype: str) -> None:
    """Set the dtype of Muon's Newton-Schulz iteration: bf16 (the default), or fp32 for exact comparisons."""
    from deepspeed.runtime.zero.muon import original_muon

    original_muon.ns_compute_dtype = lambda _: torch_dtype(dtype)


def train_context(task: Task, model: Any) -> TrainContext:
    job = job_of(task)
    layout = ParallelDims.from_job(job)
    loader, packs, steps = training_loader(job, *planned(job, Path(task["data"])))
    evaluation = {"eval": evaluation_loader(job, *planned(job, Path(task["held_out"])))} if job.eval else {}
    return TrainContext(
        job=job,
        loader=loader,
        packs=packs,
        steps=steps,
        evaluation=evaluation,
        rank=dist.get_rank(),
        layout=layout,
        sequence=ulysses.create_sequence_group(layout, 60),
        device=torch.device("cpu"),
        attn_backend="sdpa",
        shape=None,
        head=TiledHead(model, job.model.loss_tile_tokens) if job.model.loss_tile_tokens else None,
    )


def run_training(task: Task) -> Answer:
    """Train from scratch or from a checkpoint.

    Returns:
        Steps, evaluations and optimizer state, and arrays: the gradients of the first step, and the
        parameters before and after training if the task requests them.
    """
    resumed = "resume" in task or "fall_back" in task
    engine = engine_of(task, load_weights=not resumed)
    context, recorder = train_context(task, engine.module), _Recorder(task)
    initial = probe.full_parameters(engine.module) if task.get("initial") else {}
    answer: dict[str, Any] = {}
    with probe.first_gradients(engine) as gradients:
        start = 0
        if resumed:
            paths = [Path(path) for path in task.get("fall_back", [task.get("resume")])]
            restored, answer["notes"] = checkpointer.load_newest(engine, paths)
            start = restored.step
            answer |= {"bytes_read": restored.bytes_read, "bytes_held": restored.bytes_held}
        if "save_again_to" in task:
            checkpointer.save(engine, Path(task["save_again_to"]), start, 1, lambda: None)
        try:
            train(engine, context, recorder, start)
        except _End:
            pass
        except TrainingError as error:
            answer["problems"] = error.problems
    parameters = probe.full_parameters(engine.module) if task.get("parameters") else {}
    answer["optimizer_elements"] = probe.optimizer_elements(engine)
    answer["optimizer"] = probe.optimizer_state(engine)
    if "swapped" in task:
        files = Path(task["swapped"]).rglob(f"rank{dist.get_rank()}/**/*")
        answer["trained_of_rank"] = sum(getattr(engine.optimizer, "fp16_partitioned_groups_flat_numel", ()))
        answer["swapped_bytes"] = sum(file.stat().st_size for file in files if file.is_file())
    engine.destroy()
    arrays = {f"gradient {name}": value for name, value in gradients.items()}
    arrays |= {f"parameter {name}": value for name, value in parameters.items()}
    arrays |= {f"initial {name}": value for name, value in initial.items()}
    return {**answer, "start": start, "steps": recorder.steps, "evaluations": recorder.evaluations}, arrays


def refuse_to_load(task: Task) -> Answer:
    """Try to load several checkpoints, and return the problems of each, None if it was loaded."""
    engine = engine_of(task)
    found = {}
    for path in task["checkpoints"]:
        try:
            checkpointer.load(engine, Path(path))
            found[Path(path).name] = None
        except TrainingError as error:
            found[Path(path).name] = list(error.problems)
    return {"problems": found}, {}


def fail_to_save(task: Task) -> Answer:
    """Save a checkpoint for each case, with an injected failure, and return the error of each or None."""
    engine = engine_of(task)
    write = HashingWriter.write
    found = {}
    for step, case in enumerate(task["cases"], start=1):
        if "lose" in case and dist.get_rank() == 1:
            for folder in list(Path(case["lose"]).rglob("rank1")):
                shutil.rmtree(folder)
        if case.get("full_on_rank") == dist.get_rank():
            HashingWriter.write = _full
        try:
            with _file_limit(case.get("file_limit_bytes")):
                checkpointer.save(engine, Path(case["folder"]), step, 1, lambda case=case: _permit(case))
            found[case["name"]] = None
        except Exception as error:
            found[case["name"]] = f"{type(error).__name__}: {error}"
        HashingWriter.write = write
    return {"errors": found}, {}


@contextmanager
def _file_limit(size_bytes: int | None) -> Iterator[None]:
    """Limit the size of written files, so that writes fail as on a full disk; None keeps the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes or before[0], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _permit(case: Task) -> None:
    if case.get("forbidden"):
        raise PermissionError("a newer attempt has taken over")


def build_partitioned(task: Task) -> Answer:
    """Build a model with ZeRO-3; return the elements on this rank, and the devices weights were loaded to."""
    from transformers import modeling_utils

    read, places = modeling_utils.load_state_dict, []

    def watched(file: Any, map_location: Any = "cpu", **options: Any) -> Any:
        places.append(str(map_location))
        return read(file, map_location=map_location, **options)

    modeling_utils.load_state_dict = watched
    job = job_of(task)
    try:
        model = build_model(job, torch.float32, render(job, "fp32", "cpu"))
    finally:
        modeling_utils.load_state_dict = read
    parameters = list(model.parameters())
    return {
        "whole": sum(parameter.ds_numel for parameter in parameters),
        "held": sum(parameter.ds_tensor.numel() for parameter in parameters),
        "visible": sum(parameter.numel() for parameter in parameters),
        "read_to": places,
    }, {}


def refuse_to_build(task: Task) -> Answer:
    """Try to build several models, and return the problems of each, None if it was built.

    `{rank}` in a model path is replaced by the rank of this process.
    """
    found = {}
    for name, document in task["jobs"].items():
        document["model"]["path"] = document["model"]["path"].format(rank=dist.get_rank())
        job = JobSpec.model_validate_json(json.dumps(document))
        try:
            build_model(job, torch.float32, render(job, "fp32", "cpu"))
            found[name] = None
        except SpecError as error:
            found[name] = list(error.problems)
    return {"problems": found}, {}


ACTIONS: dict[str, Callable[[Task], Answer]] = {
    "refuse_to_build": refuse_to_build,
    "train": run_training,
    "build_partitioned": build_partitioned,
    "refuse_to_load": refuse_to_load,
    "fail_to_save": fail_to_save,
}


def main(folder: Path, actions: dict[str, Callable[[Task], Answer]]) -> None:
    """Run the tasks of a folder, and write answers and arrays to the same folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    join_process_group(120)
    for task in json.loads((folder / "tasks.json").read_text(encoding="utf-8")):
        answer, arrays = actions[task["action"]](task)
        rank = dist.get_rank()
        (folder / f"{task['name']}.{rank}.json").write_text(json.dumps(answer), encoding="utf-8")
        if rank == 0 and arrays:
            # Published by rename: a failure of another rank may end this process at any time.
            draft = folder / f"{task['name']}.partial.npz"
            np.savez(draft, **arrays)
            draft.rename(folder / f"{task['name']}.npz")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), ACTIONS)
    # All results are written. Skip interpreter shutdown, which on a busy machine can abort the process if a
    # native thread still runs.
    sys.stdout.flush()
    os._exit(0)
