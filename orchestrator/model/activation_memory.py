"""Activation memory: gradient checkpointing, offload of layer inputs to host memory, and tiled MLPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from orchestrator.errors import SpecError

# Operators whose outputs `selective` saves, because they are the most expensive to recompute: matmuls, and
# the attention operator of every backend. Entries are "namespace::operator"; operators of packages that are
# not installed never match.
_KEPT_OPERATORS = frozenset(
    {
        "aten::mm",
        "aten::bmm",
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
    }
)
_T = TypeVar("_T")
_MLP = "mlp"  # attribute name of the MLP in the decoder layers of transformers


def checkpoint_layers(model: nn.Module, keep: Literal["full", "selective", "none"], offload: bool) -> None:
    """Enable gradient checkpointing in every decoder layer.

    Args:
        model: A causal LM of transformers; changed in place.
        keep: `full` saves only the input of each layer and recomputes the layer; `selective` saves matmul and
            attention outputs and recomputes the rest; `none` saves all activations.
        offload: Whether to keep the saved layer inputs in host memory (with `full`).

    Raises:
        SpecError: The architecture does not support gradient checkpointing.
    """
    if keep == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise SpecError(
            f"model.gradient_checkpointing={keep} cannot be used with {type(model).__name__}, whose layers "
            "transformers cannot recompute; use gradient_checkpointing: none"
        )
    options: dict[str, object] = {"use_reentrant": False}
    if keep == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[operator]
    if offload:
        for layer in model.modules():
            if getattr(layer, "gradient_checkpointing", False) is True:
                recompute = cast(Callable[..., object], layer._gradient_checkpointing_func)
                layer._gradient_checkpointing_func = partial(_waiting_in_host_memory, recompute)  # type: ignore[assignment]


def _waiting_in_host_memory(run: Callable[..., _T], *args: object, **kwargs: object) -> _T:
    """Call the checkpoint function `run` with its saved tensors offloaded to host memory.

    The memory is pinned if CUDA is available. transformers has the same feature, but always pins memory,
    which torch rejects on machines without an accelerator.
    """
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return run(*args, **kwargs)


def _policy(context: object, operator: OpOverload, *args: object, **kwargs: object) -> CheckpointPolicy:
    # operator.name() is "namespace::operator.overload"; the overload does not matter.
    name: str = operator.name()  # type: ignore[no-untyped-call]
    kept = name.split(".")[0] in _KEPT_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class TiledMLP:
    """An MLP forward function that processes the tokens in tiles.

    Each tile is recomputed in the backward pass, so peak memory of the inner activations is one tile of
    [tile_tokens, intermediate_size], independent of the number of tokens (Arctic Long Sequence Training,
    arXiv 2506.13996). It replaces the `forward` of the MLP module, so parameter names do not change.

    Args:
        forward: The original forward function of the MLP, from [1, T, hidden] to [1, T, hidden].
        tile_tokens: Tokens per tile.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], tile_tokens: int) -> None:
        self._forward, self._tile_tokens = forward, tile_tokens

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the output of the MLP, shape [1, T, hidden], for hidden states of the same shape."""
        tiles = torch.split(hidden, self._tile_tokens, dim=1)
        return torch.cat([checkpoint(self._forward, tile, use_reentrant=False) for tile in tiles], dim=1)


def tile_mlps(model: nn.Module, tile_tokens: int) -> None:
    """Replace the forward function of every MLP of a model by a tiled one.

    Args:
        model: A causal LM of transformers; changed in place.
        tile_tokens: Tokens per tile.

    Raises:
        SpecError: The model has no module named `mlp`, or its MLPs are mixtures of experts, which do not
            process each token independently.
    """
    found = [module for name, module in model.named_modules() if name.split(".")[-1] == _MLP]
    if not found or any(name == "experts" for mlp in found for name, _ in mlp.named_children()):
        raise SpecError(
            f"model.mlp_tile_tokens={tile_tokens} cannot be used with {type(model).__name__}, whose layers "
            "have no plain MLP; leave out mlp_tile_tokens"
        )
    for mlp in found:
        mlp.forward = TiledMLP(mlp.forward, tile_tokens)


def tiled_mlps(model: nn.Module) -> list[nn.Module]:
    """Return the tiled MLPs; under ZeRO-3 their weights must stay gathered while any tile runs."""
    return [module for module in model.modules() if isinstance(module.__dict__.get("forward"), TiledMLP)]
