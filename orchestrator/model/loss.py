"""The loss: a sum over labelled positions, so that whoever knows the whole window can normalise it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

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


class PackedRow(Protocol):
    """Packs laid end to end, or a worker's part of them, of T slots, as `orchestrator.data` makes them."""

    @property
    def input_ids(self) -> Int64Array:
        """Token ids, shape [T]."""

    @property
    def position_ids(self) -> Int64Array:
        """Position of each token in its own document, shape [T]."""

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """Tokens of each document and each piece of padding in the whole row."""

    @property
    def label_positions(self) -> Int64Array:
        """Positions whose output is scored, shape [trained tokens]."""

    @property
    def labels(self) -> Int64Array:
        """The token that should follow each of them, shape [trained tokens]."""


@dataclass(frozen=True)
class ModelInputs:
    """A micro-batch on its device, as the model takes it."""

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
        """Move a micro-batch to a device; shapes [1, T] for tokens, [trained_tokens] for labels."""

        def move(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return cls(
            input_ids=move(batch.input_ids).unsqueeze(0),
            position_ids=move(batch.position_ids).unsqueeze(0),
            documents=VarlenMetadata.from_lengths(batch.document_lengths, attn_backend, device, sequence),
            label_positions=move(batch.label_positions),
            labels=move(batch.labels),
        )


class TiledHead:
    """An LM head that scores labels a tile at a time and gives their loss, never all logits at once.

    Logits of a tile are computed again in the backward pass instead of being kept, so that memory holds one
    tile of [tile_tokens, vocabulary] whatever the number of labels. It stands in the place of the head's own
    forward function, so parameters keep their names, and ZeRO-3 gathers the head's weight once for all tiles.

    Args:
        model: A causal LM of transformers.
        tile_tokens: Labels scored at once.

    Raises:
        SpecError: The architecture changes logits after its head, where this one no longer has any.
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
        # A trained copy beside the frozen head (peft's modules_to_save) is a module inside another. Were the
        # outer one tiled, ZeRO-3 would gather the copy for each tile, and ranks differ in how many they have.
        head = getattr(head, "modules_to_save", {"default": head})["default"]
        self._plain, self._tile_tokens = head.forward, tile_tokens
        self._labels: Tensor | None = None
        head.forward = self

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits, or inside `scoring` the loss of the labels, shape [1, 1, 1]."""
        if self._labels is None:
            logits: Tensor = self._plain(hidden)
            return logits
        total = hidden.new_zeros((), dtype=torch.float32)
        rows_of, labels_of = (
            torch.split(each, self._tile_tokens) for each in (hidden.squeeze(0), self._labels)
        )
        tiles = zip(rows_of, labels_of, strict=True)
        for rows, labels in tiles:
            total = total + checkpoint(self._tile, rows, labels, use_reentrant=False)
        return total.view(1, 1, 1)

    @contextmanager
    def scoring(self, labels: Tensor) -> Iterator[None]:
        """Give losses of these labels inside the block."""
        self._labels = labels
        try:
            yield
        finally:
            self._labels = None

    def _tile(self, rows: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self._plain(rows).float(), labels, reduction="sum")


def loss_sum(model: Callable[..., Any], inputs: ModelInputs, head: TiledHead | None = None) -> Tensor:
    """Return the cross-entropy summed over the labelled positions, in float32.

    The LM head runs at labelled positions only. A batch without any gives 0 and still takes part in the
    backward pass, as ZeRO-3 needs of every rank.

    Args:
        model: A causal LM of transformers, or the engine around it.
        inputs: The micro-batch.
        head: The model's head, where it scores labels by tiles.

    Returns:
        A scalar.
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
        return output.logits.squeeze()  # type: ignore[no-any-return]
    return functional.cross_entropy(output.logits.squeeze(0).float(), inputs.labels, reduction="sum")
