"""The part of DeepSpeed's engine that this project uses, as protocols: DeepSpeed ships no types.

Names and signatures are those of deepspeed/runtime/engine.py and deepspeed/runtime/zero (0.19). Attributes
that are methods upstream are declared as attributes if this project replaces them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from orchestrator.model.loss import CausalOutput


class EngineOptimizer(Protocol):
    """`engine.optimizer`: one of the ZeRO optimizers, or torch.optim.Optimizer under ZeRO-0 in fp32."""

    param_groups: list[dict[str, Any]]
    step: Callable[..., object]


class ZeroOptimizer(EngineOptimizer, Protocol):
    """What the optimizers of ZeRO-1, 2 and 3 have in common.

    Attributes:
        averaged_gradients: Reduced gradients by parameter group; this rank's partitions of them.
        clip_grad: Largest gradient norm; 0 does not clip.
        loss_scale: By which the loss, and so every gradient, is multiplied.
    """

    averaged_gradients: dict[int, list[Tensor]]
    clip_grad: float
    loss_scale: float
    _global_grad_norm: float


class TrainEngine(Protocol):
    """DeepSpeed's engine around a causal language model.

    Attributes:
        module: The model, a `PreTrainedModel` or a `PeftModel`.
        optimizer: DeepSpeed's optimizer around the one that was configured.
        micro_steps: Micro-steps so far; those of a step are counted from a multiple of their number.
    """

    module: nn.Module
    optimizer: EngineOptimizer
    micro_steps: int
    _global_grad_norm: float | Tensor

    def __call__(self, *args: object, **kwargs: object) -> CausalOutput:
        """Run the model's forward pass; returns a `CausalLMOutputWithPast`."""

    def train(self, mode: bool = True) -> object:
        """Enable dropout."""

    def eval(self) -> object:
        """Disable dropout."""

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> object:
        """Backpropagate; `scale_wrt_gas` divides the loss by gradient_accumulation_steps."""

    def step(self) -> object:
        """End a micro-step; at an accumulation boundary update the parameters."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the next `step` updates the parameters."""

    def was_step_applied(self) -> bool:
        """Return whether the last step updated the parameters; False after an fp16 overflow."""

    def get_global_grad_norm(self) -> float | Tensor | None:
        """Return the L2 norm of the last step's gradient over all ranks, before clipping."""

    def fp16_enabled(self) -> bool:
        """Return whether parameters are in fp16."""

    def gradient_accumulation_steps(self) -> int:
        """Return the number of micro-steps of a step."""

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage, 0 to 3."""
