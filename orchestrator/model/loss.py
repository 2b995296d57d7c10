"""The loss: a sum over labelled positions, so that whoever knows the whole window can normalise it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.model.attention import Documents, Kernel
from orchestrator.parallel.ulysses import SequenceGroup

Int64Array = npt.NDArray[np.int64]


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
class Inputs:
    """A micro-batch on its device, as the model takes it."""

    input_ids: Tensor
    position_ids: Tensor
    documents: Documents
    label_positions: Tensor
    labels: Tensor

    @classmethod
    def of(
        cls,
        batch: PackedRow,
        kernel: Kernel,
        device: torch.device,
        sequence: SequenceGroup | None = None,
    ) -> Inputs:
        """Move a micro-batch to a device; shapes [1, T] for tokens, [trained_tokens] for labels."""

        def move(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return cls(
            input_ids=move(batch.input_ids).unsqueeze(0),
            position_ids=move(batch.position_ids).unsqueeze(0),
            documents=Documents.of(batch.document_lengths, kernel, device, sequence),
            label_positions=move(batch.label_positions),
            labels=move(batch.labels),
        )


def loss_sum(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """Return the cross-entropy summed over the labelled positions, in float32.

    The LM head runs at labelled positions only. A batch without any gives 0 and still takes part in the
    backward pass, as ZeRO-3 needs of every rank.

    Args:
        model: A causal LM of transformers, or the engine around it.
        inputs: The micro-batch.

    Returns:
        A scalar.
    """
    output = model(
        input_ids=inputs.input_ids,
        position_ids=inputs.position_ids,
        documents=inputs.documents,
        logits_to_keep=inputs.label_positions,
        use_cache=False,
    )
    return functional.cross_entropy(output.logits[0].float(), inputs.labels, reduction="sum")
