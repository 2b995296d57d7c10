"""Muon under ZeRO: the gradient is measured and clipped before Muon makes an update of it.

DeepSpeed 0.19 puts Muon's updates in the place of the gradients, and takes the norm and clips afterwards. An
update is a matrix whose singular values are all near one, however small the gradient was: its norm says
nothing of the training, and a model has so many of them that clipping always takes effect. PyTorch's Muon,
and Keller Jordan's, see a gradient that was clipped before. So does this: DeepSpeed is told not to clip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def clip_before_update(optimizer: Any, clip_norm: float) -> None:
    """Let one of DeepSpeed's ZeRO optimizers clip the gradient instead of Muon's update.

    Args:
        optimizer: `engine.optimizer` of ZeRO-1, 2 or 3 around Muon.
        clip_norm: Largest norm; 0 does not clip.
    """
    optimizer.clip_grad = 0.0
    if hasattr(optimizer, "_apply_muon_to_accumulated_grads"):  # ZeRO-3
        _between(optimizer, "_apply_muon_to_accumulated_grads", _Stage3(optimizer), clip_norm)
    else:
        partitions = _Stages1And2(optimizer)
        optimizer.get_flat_partition = partitions.postpone
        _between(optimizer, "step", partitions, clip_norm)


class _Stage3:
    """Gradients of ZeRO-3, all of which lie in partitions when Muon's turn comes."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def tensors(self) -> Iterator[Tensor]:
        """Yield this rank's partition of each gradient."""
        for partitions in self._optimizer.averaged_gradients.values():
            yield from partitions

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for tensor in self.tensors():
            tensor.mul_(factor)

    def finish(self) -> None:
        """Nothing is left to do."""


class _Stages1And2:
    """Gradients of ZeRO-1 and 2: of Muon's groups as whole matrices, of the others as partitions.

    DeepSpeed makes Muon's updates where it cuts partitions, at the end of the backward pass, when it has not
    seen the gradients of all groups. Here that waits for the step.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._cut: Callable[..., Any] = optimizer.get_flat_partition
        self._postponed: dict[int, tuple[list[Tensor], tuple[Any, ...], dict[str, Any]]] = {}

    def postpone(self, tensor_list: list[Tensor], *arguments: Any, **options: Any) -> Any:
        """Cut a group's partition; where Muon updates it, without the update for the time being."""
        group = options["param_group_idx"]
        if not tensor_list or not self._optimizer._is_muon_group(tensor_list):
            return self._cut(tensor_list, *arguments, **options)
        whole = self._optimizer.all_grad_tensors[group]
        self._postponed[group] = (whole, (tensor_list, *arguments), options)
        skipped, left = int(self._optimizer.first_offset[group]), int(self._optimizer.partition_size[group])
        owned = []
        for gradient in whole:
            owned.append(gradient.reshape(-1)[skipped:][:left])
            left -= owned[-1].numel()
            skipped = 0
        return owned

    def tensors(self) -> Iterator[Tensor]:
        """Yield what this rank owns of each gradient; parts of one matrix may lie on several ranks."""
        for gradients in self._optimizer.averaged_gradients.values():
            yield from gradients

    def scale(self, factor: float) -> None:
        """Multiply all gradients, of Muon's groups the whole matrices."""
        for group, gradients in self._optimizer.averaged_gradients.items():
            for gradient in self._postponed[group][0] if group in self._postponed else gradients:
                gradient.mul_(factor)

    def finish(self) -> None:
        """Cut the partitions of Muon's groups, with its updates in them."""
        optimizer = self._optimizer
        for group, (whole, arguments, options) in self._postponed.items():
            optimizer.all_grad_tensors[group] = whole
            optimizer.averaged_gradients[group] = self._cut(*arguments, **options)
        self._postponed.clear()


def _between(optimizer: Any, method: str, gradients: _Stage3 | _Stages1And2, clip_norm: float) -> None:
    """Clip before a method of the optimizer runs, and report the norm after its step."""
    original, norm = getattr(optimizer, method), [math.nan]

    def clip_first(*arguments: Any) -> None:
        scaled_norm = _norm(gradients.tensors())
        norm[0] = scaled_norm / float(optimizer.loss_scale)
        if clip_norm and math.isfinite(scaled_norm):  # of any other, DeepSpeed finds the overflow
            gradients.scale(min(1.0, clip_norm / (norm[0] + 1e-6)))
        gradients.finish()
        original(*arguments)

    setattr(optimizer, method, clip_first)
    step = optimizer.step

    def step_and_report(*arguments: Any) -> None:
        step(*arguments)
        optimizer._global_grad_norm = norm[0]

    optimizer.step = step_and_report


def _norm(gradients: Iterator[Tensor]) -> float:
    """Return the L2 norm of a gradient of which every rank holds a part."""
    from deepspeed.accelerator import get_accelerator

    total = torch.zeros((), dtype=torch.float64, device=get_accelerator().current_device_name())
    for gradient in gradients:
        total += gradient.detach().double().square().sum()
    dist.all_reduce(total)
    return math.sqrt(total.item()) if torch.isfinite(total) else math.nan
