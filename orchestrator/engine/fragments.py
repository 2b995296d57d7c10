"""Where DeepSpeed keeps the fp32 weight and the optimizer state of each trained parameter on this rank.

| ZeRO | tensor that the optimizer updates | what a rank has of a parameter |
|---|---|---|
| 0 | the model's weight (fp32), or an fp32 copy of it | all of it |
| 1, 2 | one flat partition for each parameter group | the elements inside the partition, if any |
| 3 | one flat partition for each sub-group | the same share of every parameter; the last ones are padded |

Attributes of DeepSpeed's optimizers are those of deepspeed/runtime/zero and runtime/fp16 (0.19).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from orchestrator.engine.train_engine import TrainEngine
from orchestrator.errors import TrainingError


@dataclass(frozen=True)
class Fragment:
    """What this rank updates of one trained parameter.

    Attributes:
        name: Name of the parameter in the model.
        shape: Shape of the whole parameter.
        key: The tensor that the optimizer updates, which is the key of its state; may be on NVMe.
        key_elements: Elements of `key` on this rank.
        at: First element of the fragment in `key`.
        start: First element of the fragment in the flattened parameter.
        length: Elements of the fragment.
        matrix_at: First element of the parameter in a state that DeepSpeed keeps of whole matrices; see `of`.
        group: Number of the parameter group or sub-group.
    """

    name: str
    shape: tuple[int, ...]
    key: Tensor
    key_elements: int
    at: int
    start: int
    length: int
    matrix_at: int
    group: int

    @property
    def elements(self) -> int:
        """Elements of the whole parameter."""
        return int(torch.Size(self.shape).numel())

    @property
    def is_alone(self) -> bool:
        """Whether `key` is this parameter and nothing else."""
        return self.key_elements == self.elements == self.length

    def of(self, buffer: Tensor) -> tuple[Tensor, int]:
        """Return this parameter's elements of a buffer, and the first one's index in the flattened parameter.

        Args:
            buffer: `key` itself, or a state of the same size, or Muon's momentum under ZeRO-1 and 2, which is
                of all whole matrices that overlap this rank's partition.
        """
        flat = buffer.detach().view(-1)
        if flat.numel() == self.key_elements:
            return flat.narrow(0, self.at, self.length), self.start
        return flat.narrow(0, self.matrix_at, self.elements), 0


def fragments(engine: TrainEngine) -> Iterator[Fragment]:
    """Yield what this rank updates of each trained parameter.

    Raises:
        TrainingError: DeepSpeed chose an optimizer class whose memory is not known here.
    """
    names = {id(weight): name for name, weight in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    of_stage = {0: _unpartitioned, 3: _zero3}.get(stage, _zero12)
    yield from of_stage(cast(Any, engine.optimizer), names)


def _zero3(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group, (key, weights) in enumerate(
        zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
    ):
        sizes = [int(weight.partition_numel()) for weight in weights]
        at = 0
        for weight, size in zip(weights, sizes, strict=True):
            start = size * int(optimizer._get_param_partition_rank(weight))
            length = min(size, int(weight.ds_numel) - start)
            if length > 0:  # the rest is padding
                shape = tuple(weight.ds_shape)
                yield Fragment(names[id(weight)], shape, key, sum(sizes), at, start, length, 0, group)
            at += size


def _zero12(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    if getattr(optimizer, "round_robin_gradients", False):
        # DeepSpeed links the fragments in the order of the parameters, and fills the buffers in another one.
        raise TrainingError(
            "checkpoints need zero_optimization.round_robin_gradients=false: DeepSpeed records other places "
            "of the weights than it uses; set it to false in the policy of ds_configs"
        )
    partitions = zip(optimizer.single_partition_of_fp32_groups, optimizer.params_in_partition, strict=True)
    for group, (key, weights) in enumerate(partitions):
        matrix_at = 0
        for weight in weights:
            here, there = weight._hp_mapping.lp_fragment_address, weight._hp_mapping.hp_fragment_address
            shape = tuple(weight.shape)
            place = (int(there.start), int(here.start), int(here.numel))
            yield Fragment(names[id(weight)], shape, key, key.numel(), *place, matrix_at, group)
            matrix_at += weight.numel()


def _unpartitioned(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for group, (key, weights) in enumerate(_masters(optimizer)):
        at = 0
        for weight in weights:
            size, shape = weight.numel(), tuple(weight.shape)
            yield Fragment(names[id(weight)], shape, key, key.numel(), at, 0, size, 0, group)
            at += size


def _masters(optimizer: Any) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """Yield each tensor that the optimizer updates under ZeRO-0, and the model's weights in it."""
    if isinstance(optimizer, torch.optim.Optimizer):  # fp32: PyTorch's own, which updates the weights
        yield from ((weight, [weight]) for group in optimizer.param_groups for weight in group["params"])
    elif hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            yield from ((master, [weight]) for master, weight in zip(masters, weights, strict=True))
    elif hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer
        yield from zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
    else:
        raise TrainingError(
            f"DeepSpeed chose {type(optimizer).__name__}, whose state cannot be saved yet; use "
            "parallel.zero_stage=1 or higher"
        )


def base_optimizer(engine: TrainEngine) -> torch.optim.Optimizer:
    """Return the optimizer inside DeepSpeed's, whose state has the keys of the fragments."""
    return cast(torch.optim.Optimizer, getattr(engine.optimizer, "optimizer", engine.optimizer))


def is_on_nvme(engine: TrainEngine) -> bool:
    """Return whether parameters or optimizer state are offloaded to NVMe."""
    optimizer = engine.optimizer
    return any(getattr(optimizer, name, False) for name in ("swap_optimizer", "params_in_nvme_and_cpu"))


def prepare_to_replace(engine: TrainEngine) -> None:
    """Prepare for new fp32 weights: under ZeRO-3 no parameter may be gathered."""
    if engine.zero_optimization_stage() == 3:
        cast(Any, engine.optimizer).checkpoint_event_prologue()


def refresh_weights(engine: TrainEngine) -> None:
    """Copy the fp32 weights, which were replaced, to the model's own weights on all ranks."""
    optimizer: Any = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 3:
        if not is_on_nvme(engine):  # else each sub-group was refreshed before it was written to NVMe
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        optimizer.update_lp_params()
        optimizer._hp_optimizer_states_linked = False  # they are views of tensors that may be replaced
    else:
        for master, weights in _masters(optimizer):
            at = 0
            for weight in weights:
                if weight is not master:
                    weight.data.copy_(master.detach().view(-1)[at : at + weight.numel()].view(weight.shape))
                at += weight.numel()
