"""Cross-entropy loss, summed over labelled positions; the caller divides by the label count of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from orchestrator.errors import SpecError
from orchestrator.model.attention import AttnBackend, VarlenMetadata
from orchestrator.parallel.ulysses import SequenceGroup

Int64Array = npt.NDArray[np.int64]
_CHANGES_OF_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


class CausalOutput(Protocol):
    """What is used of the output of a causal LM, such as `CausalLMOutputWithPast`.

    Attributes:
        logits: Shape [1, tokens, vocab_size].
    """

    logits: Tensor


class PackedRow(Protocol):
    """Interface of a micro-batch of `orchestrator.data`: its packs concatenated to one row of T tokens.

    Under sequence parallelism T is the slice that this worker holds.
    """

    @property
    def input_ids(self) -> Int64Array:
        """Token ids, shape [T]."""

    @property
    def position_ids(self) -> Int64Array:
        """Position of each token within its document, shape [T]."""

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """Length in tokens of each document and each run of padding, of the whole row on every worker."""

    @property
    def label_positions(self) -> Int64Array:
        """Indices into [T] of the positions at which logits are computed, shape [trained_tokens]."""

    @property
    def labels(self) -> Int64Array:
        """Target token id of each label position (already shifted by one), shape [trained_tokens]."""


@dataclass(frozen=True)
class ModelInputs:
    """Tensors of one micro-batch on the device of the model.

    Attributes:
        input_ids: Token ids, shape [1, T].
        position_ids: Position of each token within its document, shape [1, T].
        documents: Document boundaries for the attention backend.
        label_positions: Indices into [T], shape [trained_tokens].
        labels: Target token ids, shape [trained_tokens].
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: VarlenMetadata
    label_positions: Tensor
    labels: Tensor

    @classmethod
    def from_batch(
        cls,
        batch: PackedRow,
        attn_backend: AttnBackend,
        device: torch.device,
        sequence: SequenceGroup | None = None,
    ) -> ModelInputs:
        """Copy a micro-batch to a device.

        Args:
            batch: The micro-batch as NumPy arrays.
            attn_backend: Decides the format of the document boundaries.
            device: Target device.
            sequence: Sequence-parallel group; None if each worker holds whole rows.
        """

        def move(array: Int64Array) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return cls(
            input_ids=move(batch.input_ids).unsqueeze(0),
            position_ids=move(batch.position_ids).unsqueeze(0),
            documents=VarlenMetadata.from_lengths(batch.document_lengths, attn_backend, device, sequence),
            label_positions=move(batch.label_positions),
            labels=move(batch.labels),
        )


class TiledHead:
    """An LM head that computes the loss in tiles of labels and never materializes all logits.

    The logits of a tile are recomputed in the backward pass, so peak memory is one tile of
    [tile_tokens, vocab_size], independent of the number of labels. It replaces the `forward` of the head
    module: parameter names do not change, and ZeRO-3 gathers the head's weight once for all tiles.

    Args:
        model: A causal LM of transformers.
        tile_tokens: Labels per tile.

    Raises:
        SpecError: The architecture transforms logits after its head (softcapping, scaling), where a tiled
            head returns a loss instead of logits.
    """

    def __init__(self, model: nn.Module, tile_tokens: int) -> None:
        config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        for name in _CHANGES_OF_LOGITS:
            value = getattr(config, name, None)
            if value not in (None, 1.0):
                raise SpecError(
                    f"model.loss_tile_tokens={tile_tokens} cannot be used with {type(model).__name__}, which "
                    f"changes its logits afterwards ({name}={value}); use loss_tile_tokens: null"
                )
        head = model.get_output_embeddings()  # type: ignore[operator]
        # peft's modules_to_save wraps the frozen head and its trained copy in an outer module. Tiling that
        # outer module would make ZeRO-3 gather the copy once per tile, and ranks have different numbers of
        # tiles, so their collectives would not match. Tile the inner module instead.
        head = getattr(head, "modules_to_save", {"default": head})["default"]
        self._plain, self._tile_tokens = head.forward, tile_tokens
        self._labels: Tensor | None = None
        head.forward = self

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits of shape [1, T, vocab_size], or inside `scoring` the summed loss, shape [1, 1, 1].

        Args:
            hidden: Hidden states, shape [1, T, hidden]; inside `scoring` only those at label positions,
                shape [1, trained_tokens, hidden].
        """
        if self._labels is None:
            logits: Tensor = self._plain(hidden)
            return logits
        total = hidden.new_zeros((), dtype=torch.float32)
        # Tiles of [tile_tokens, hidden] with their labels [tile_tokens]; the last tile may be shorter.
        rows_of, labels_of = (
            torch.split(each, self._tile_tokens) for each in (hidden.squeeze(0), self._labels)
        )
        tiles = zip(rows_of, labels_of, strict=True)
        for rows, labels in tiles:
            total = total + checkpoint(self._tile, rows, labels, use_reentrant=False)
        # The rank of logits, [1, tokens, vocab_size], in whose place transformers returns it.
        return total.view(1, 1, 1)

    @contextmanager
    def scoring(self, labels: Tensor) -> Iterator[None]:
        """Make calls inside the block return the loss of these labels, shape [trained_tokens]."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def _tile(self, rows: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self._plain(rows).float(), labels, reduction="sum")


def loss_sum(
    model: Callable[..., CausalOutput], inputs: ModelInputs, head: TiledHead | None = None
) -> Tensor:
    """Return the cross-entropy summed over the labelled positions, in float32.

    The LM head runs at labelled positions only. A batch without labels has loss 0 that is still connected to
    the graph: under ZeRO-3 every rank must run the backward pass and its collectives.

    Args:
        model: A causal LM of transformers, or the DeepSpeed engine that wraps it.
        inputs: The micro-batch.
        head: The tiled head of the model; None if the model returns logits.

    Returns:
        A scalar tensor.
    """
    with head.scoring(inputs.labels) if head else nullcontext():
        output = model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            documents=inputs.documents,
            logits_to_keep=inputs.label_positions,
            use_cache=False,
        )
    if head:
        return output.logits.squeeze()
    # logits: [1, trained_tokens, vocab_size], cast to float32 before the log-softmax.
    return functional.cross_entropy(output.logits.squeeze(0).float(), inputs.labels, reduction="sum")
