"""Gradient clipping for Muon under ZeRO: clip the gradient before Muon turns it into an update.

DeepSpeed 0.19 replaces gradients by Muon's updates and computes norm and clipping afterwards. An update is
a matrix whose singular values are all close to 1, whatever the gradient was, so its norm says nothing about
training, and clipping it always takes effect. In PyTorch's Muon and Keller Jordan's the gradient is clipped
first. This module does the same, and disables DeepSpeed's own clipping.

It replaces methods of DeepSpeed's optimizers (deepspeed/runtime/zero/stage3.py and stage_1_and_2.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from orchestrator.engine.train_engine import ZeroOptimizer

_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class _Zero12Optimizer(ZeroOptimizer, Protocol):
    """DeepSpeed's ZeRO-1/2 optimizer, as far as it is used here.

    Attributes:
        all_grad_tensors: By group of Muon, the reduced gradients of all matrices that overlap this rank's
            partition, each [rows, columns]: Muon needs whole matrices.
        first_offset: By group, the elements of the first matrix that belong to an earlier rank.
        partition_size: By group, the elements that this rank owns.
        get_flat_partition: Cuts this rank's partition out of whole gradients, and applies Muon's update.
    """

    all_grad_tensors: dict[int, list[Tensor]]
    first_offset: list[int]
    partition_size: list[int]
    get_flat_partition: Callable[..., list[Tensor]]

    def _is_muon_group(self, tensors: list[Tensor]) -> bool: ...


class _Gradients(Protocol):
    """The gradients of one optimizer, at the time at which they are to be clipped."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield what this rank owns of each gradient; over all ranks each element occurs once."""

    def scale(self, factor: float) -> None:
        """Multiply all gradients in place."""

    def finish(self) -> None:
        """Hand the scaled gradients to Muon."""


def clip_before_update(optimizer: ZeroOptimizer, max_norm: float) -> None:
    """Make one of DeepSpeed's ZeRO optimizers clip the gradient instead of Muon's update.

    Args:
        optimizer: `engine.optimizer` of ZeRO-1, 2 or 3 around Muon.
        max_norm: Largest gradient norm; 0 does not clip.
    """
    optimizer.clip_grad = 0.0
    if hasattr(optimizer, "_apply_muon_to_accumulated_grads"):  # ZeRO-3
        _clip_before(optimizer, "_apply_muon_to_accumulated_grads", _Zero3Gradients(optimizer), max_norm)
    else:
        gradients = _Zero12Gradients(optimizer)  # type: ignore[arg-type]
        optimizer.get_flat_partition = gradients.get_flat_partition  # type: ignore[attr-defined]
        _clip_before(optimizer, "step", gradients, max_norm)


class _Zero3Gradients:
    """Gradients of ZeRO-3: all are partitioned and reduced before Muon's update."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        self._optimizer = optimizer

    def tensors(self) -> Iterator[Tensor]:
        """Yield this rank's flat partition of each gradient."""
        for partitions in self._optimizer.averaged_gradients.values():
            yield from partitions

    def scale(self, factor: float) -> None:
        """Multiply all gradients in place."""
        for tensor in self.tensors():
            tensor.mul_(factor)

    def finish(self) -> None:
        """Do nothing: DeepSpeed applies Muon itself right after."""


class _Zero12Gradients:
    """Gradients of ZeRO-1 and 2: whole matrices in Muon's groups, partitions in the others.

    DeepSpeed applies Muon where it cuts a group's partition, at the end of the backward pass. The norm over
    all groups is not known yet at that time, so Muon's update is deferred to the optimizer step.
    """

    def __init__(self, optimizer: _Zero12Optimizer) -> None:
        self._optimizer = optimizer
        self._cut_and_update = optimizer.get_flat_partition
        # By group: whole gradients, and the arguments of the deferred call.
        self._deferred: dict[int, tuple[list[Tensor], tuple[object, ...], dict[str, object]]] = {}

    def get_flat_partition(
        self, tensors: list[Tensor], *args: object, param_group_idx: int, **kwargs: object
    ) -> list[Tensor]:
        """Replace DeepSpeed's method: cut the partition, but in Muon's groups defer the update.

        Returns:
            Flat views of the whole gradients, so that scaling those scales these.
        """
        group, kwargs = param_group_idx, {**kwargs, "param_group_idx": param_group_idx}
        if not tensors or not self._optimizer._is_muon_group(tensors):
            return self._cut_and_update(tensors, *args, **kwargs)
        whole = self._optimizer.all_grad_tensors[group]
        self._deferred[group] = (whole, (tensors, *args), kwargs)
        # The partition is a slice of the concatenated gradients that may begin and end inside a matrix.
        skipped, remaining = (
            int(self._optimizer.first_offset[group]),
            int(self._optimizer.partition_size[group]),
        )
        owned = []
        for gradient in whole:
            owned.append(gradient.reshape(-1)[skipped:][:remaining])
            remaining -= owned[-1].numel()
            skipped = 0
        return owned

    def tensors(self) -> Iterator[Tensor]:
        """Yield what this rank owns of each gradient; a matrix may be split over several ranks."""
        for gradients in self._optimizer.averaged_gradients.values():
            yield from gradients

    def scale(self, factor: float) -> None:
        """Multiply all gradients in place; in Muon's groups the whole matrices, which contain the slices."""
        for group, gradients in self._optimizer.averaged_gradients.items():
            for gradient in self._deferred[group][0] if group in self._deferred else gradients:
                gradient.mul_(factor)

    def finish(self) -> None:
        """Run the deferred calls: apply Muon to the whole matrices and cut this rank's partition."""
        optimizer = self._optimizer
        for group, (whole, args, kwargs) in self._deferred.items():
            optimizer.all_grad_tensors[group] = whole
            optimizer.averaged_gradients[group] = self._cut_and_update(*args, **kwargs)
        self._deferred.clear()


def _clip_before(optimizer: ZeroOptimizer, method: str, gradients: _Gradients, max_norm: float) -> None:
    """Clip before a method of the optimizer runs, and report the norm of the gradient after its step.

    Args:
        optimizer: The optimizer whose methods are replaced.
        method: Name of the method that applies Muon.
        gradients: The gradients at the time of that method.
        max_norm: Largest gradient norm; 0 does not clip.
    """
    original, norm = getattr(optimizer, method), [math.nan]

    def clip_first(*args: object) -> None:
        scaled_norm = _norm(gradients.tensors())
        norm[0] = scaled_norm / float(optimizer.loss_scale)
        # Without a finite norm nothing is scaled: DeepSpeed then detects the overflow and skips the step.
        if max_norm and math.isfinite(scaled_norm):
            gradients.scale(min(1.0, max_norm / (norm[0] + _EPSILON)))
        gradients.finish()
        original(*args)

    setattr(optimizer, method, clip_first)
    step = optimizer.step

    def step_and_report(*args: object) -> None:
        step(*args)
        # DeepSpeed stored the norm of the update here; `engine.get_global_grad_norm` reads it.
        optimizer._global_grad_norm = norm[0]

    optimizer.step = step_and_report


def _norm(gradients: Iterator[Tensor]) -> float:
    """Return the L2 norm over all ranks' parts of a gradient; NaN if it is not finite."""
    from deepspeed.accelerator import get_accelerator

    total = torch.zeros((), dtype=torch.float64, device=get_accelerator().current_device_name())
    for gradient in gradients:
        total += gradient.detach().double().square().sum()
    dist.all_reduce(total)
    return math.sqrt(total.item()) if torch.isfinite(total) else math.nan
