"""A checkpoint's logical tensors, of which each rank holds parts, and the plan of which rank writes what.

`torch.distributed.checkpoint` (DCP) plans: what several ranks hold is written once, shared out by size, and
tensors that are not whole are refused. Its own planner knows DTensor and ShardedTensor; this one knows
consecutive elements of a flattened tensor, which is what ZeRO gives a rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors."""
    return _DTYPES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that safetensors names so."""
    return _BY_NAME[name]


@dataclass(frozen=True)
class TensorPart:
    """What one rank holds of a logical tensor: consecutive elements of the flattened tensor.

    Attributes:
        values: The elements, shape [length]; may be memory of the engine.
        start: Index of the first one in the flattened tensor.
        elements: Number of elements of the whole tensor.
    """

    values: Tensor
    start: int
    elements: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The part as DCP describes it."""
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.values.numel()]))


Parts = Mapping[str, TensorPart]
"""The parts of one rank, by the name of the logical tensor."""


class PartsSavePlanner(DefaultSavePlanner):
    """Plans which rank writes which part; ranks that hold the same part share them out by size."""

    state_dict: dict[str, TensorPart]

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """Return an item for each part of this rank."""
        self.plan = SavePlan([_write_item(name, part) for name, part in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the elements of a part."""
        return self.state_dict[index.fqn].values


def _write_item(name: str, part: TensorPart) -> WriteItem:
    data = TensorWriteData(
        chunk=part.chunk,
        properties=TensorProperties(dtype=part.values.dtype),
        size=torch.Size([part.elements]),
    )
    return WriteItem(MetadataIndex(name, part.chunk.offsets), WriteItemType.SHARD, tensor_data=data)
