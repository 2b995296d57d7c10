"""Trading work for memory: which activations a layer keeps, where they wait, and how much runs at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from orchestrator.errors import SpecError

# What costs most to compute again: matrix products, and attention in each of its kernels. An entry is an
# operator's namespace and name; those of packages that are not installed are never met.
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
_MLP = "mlp"  # what transformers calls it in each decoder layer


def checkpoint_layers(model: nn.Module, keep: Literal["full", "selective", "none"], offload: bool) -> None:
    """Let each decoder layer keep less than all its activations for the backward pass.

    Args:
        model: A causal LM of transformers.
        keep: `full` recomputes the whole layer from its input; `selective` keeps the results of matrix
            products and of attention, and recomputes what lies between them; `none` keeps everything.
        offload: Whether the layers' inputs wait in host memory (with `full`).

    Raises:
        SpecError: The architecture cannot recompute its layers.
    """
    if keep == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise SpecError(
            f"model.gradient_checkpointing={keep} cannot be used with {type(model).__name__}, whose layers "
            "transformers cannot recompute; use gradient_checkpointing: none"
        )
    options: dict[str, Any] = {"use_reentrant": False}
    if keep == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[operator]
    if offload:
        for layer in model.modules():
            if getattr(layer, "gradient_checkpointing", False) is True:
                recompute: Any = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = partial(_waiting_in_host_memory, recompute)  # type: ignore[assignment]


def _waiting_in_host_memory(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Recompute a layer as `run` does, from inputs that wait in host memory, pinned where CUDA reads it.

    transformers has this as well, and pins memory on machines without an accelerator, which torch refuses.
    """
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return run(*args, **kwargs)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator.name().split(".")[0] in _KEPT_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class TiledMLP:
    """An MLP that runs on a tile of tokens at a time and never holds its inner activations of all.

    A tile is computed again in the backward pass instead of being kept, so that memory holds one tile of
    [tile_tokens, intermediate_size] whatever the number of tokens (Arctic Long Sequence Training, arXiv
    2506.13996). It stands in the place of the MLP's own forward function, so parameters keep their names.

    Args:
        forward: The MLP's own forward function, from [1, T, hidden] to [1, T, hidden].
        tile_tokens: Tokens in a tile.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], tile_tokens: int) -> None:
        self._forward, self._tile_tokens = forward, tile_tokens

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the MLP's output, shape [1, T, hidden]."""
        tiles = torch.split(hidden, self._tile_tokens, dim=1)
        return torch.cat([checkpoint(self._forward, tile, use_reentrant=False) for tile in tiles], dim=1)


def tile_mlps(model: nn.Module, tile_tokens: int) -> None:
    """Let every MLP of a model run by tiles.

    Args:
        model: A causal LM of transformers.
        tile_tokens: Tokens in a tile.

    Raises:
        SpecError: The architecture has no MLP that treats each token by itself and can be found.
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
    """Return the MLPs that run by tiles; their weights must be at hand as long as one of them runs."""
    return [module for module in model.modules() if isinstance(module.__dict__.get("forward"), TiledMLP)]
