"""Describes a training workload: model sizes, data shape and parallelism, the input of all predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.arch.model_dims import ModelDims
from orchestrator.arch.parameters import Linear, Parameters, parameters, target_linears
from orchestrator.planner.host_memory import NO_OFFLOAD, Offload

Quantization = Literal["none", "nf4", "int8", "gptq-int4", "gptq-int8"]


@dataclass(frozen=True)
class Model:
    """Sizes of a model.

    Attributes:
        shape: Dimensions that FLOPs and activations depend on.
        parameters: Parameter counts by module.
    """

    shape: ModelDims
    parameters: Parameters

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Model | None:
        """Return the sizes described by a config.json, or None for an unsupported architecture."""
        shape, counted = ModelDims.from_config(config), parameters(config)
        return None if shape is None or counted is None else cls(shape, counted)


@dataclass(frozen=True)
class DataShape:
    """Statistics of the training data.

    Attributes:
        document_tokens: Length of a token's document, averaged over tokens; 0 if unknown.
        labelled_share: Fraction of tokens, padding included, that the loss uses as labels.
        largest_labelled_share: The labels of the pack with the most, as a fraction of max_length.
        pack_tokens: Mean tokens of a pack, padding included; 0 if every pack has max_length.
    """

    document_tokens: float = 0.0
    labelled_share: float = 1.0
    largest_labelled_share: float = 1.0
    pack_tokens: float = 0.0


UNKNOWN_DATA = DataShape()


@dataclass(frozen=True)
class Workload:
    """A model with its data shape, method and parallelism.

    Attributes:
        model: Model sizes.
        length_tokens: Tokens per row, over all sequence parallel workers; of the longest row, if they differ.
        micro_batch_size: Rows per micro-batch.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        world_size: Number of workers.
        gpus_per_node: Workers per node.
        sequence_parallel_size: Workers per row.
        method: Full fine-tuning or LoRA.
        rank: LoRA rank.
        targets: LoRA target modules, as in a job file.
        train_embeddings: Whether LoRA also trains copies of embedding and LM head.
        quantization: Format of frozen weights.
        casts_frozen_to_fp32: Whether frozen weights that are not quantized are kept in fp32, as
            `peft.prepare_model_for_kbit_training` does for bitsandbytes.
        element_bytes: Bytes per weight and activation: 2, or 4 for fp32.
        master_weights: Whether the optimizer keeps fp32 copies of 16-bit weights.
        adapter_bytes: Bytes per adapter weight.
        optimizer_bytes: Bytes of optimizer state per parameter, without the fp32 copy.
        zero_stage: ZeRO stage.
        offload: Where optimizer state and parameters are stored.
        offload_activations: Whether checkpointed activations are in host memory.
        checkpointing: Gradient checkpointing, as in a job file.
        flash: Whether attention runs without materializing the score matrix.
        loss_tile_tokens: Tokens per tile of LM head and loss; 0 for all at once.
        mlp_tile_tokens: Tokens per tile of the MLP; 0 for all at once.
        logit_bytes: Bytes per logit of all tensors that the loss holds.
        length_variation: Fraction of micro-batches that are shorter than the longest; 0 for packs.
        mean_square_tokens: Sum of squared document lengths over tokens: mean length of a token's document;
            0 for attention over the whole row.
        labelled_share: Fraction of tokens for which the LM head computes logits.
        largest_labelled_share: The largest such fraction in a micro-batch.
        mean_length_tokens: Mean tokens per row; 0 if all rows have length_tokens.
    """

    model: Model
    length_tokens: int
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    world_size: int = 1
    gpus_per_node: int = 8
    sequence_parallel_size: int = 1
    method: Literal["full", "lora"] = "full"
    rank: int = 8
    targets: str | tuple[str, ...] = "all-linear"
    train_embeddings: bool = False
    quantization: Quantization = "none"
    casts_frozen_to_fp32: bool = True
    element_bytes: int = 2
    master_weights: bool = True
    adapter_bytes: int = 4
    optimizer_bytes: float = 8.0
    zero_stage: int = 0
    offload: Offload = NO_OFFLOAD
    offload_activations: bool = False
    checkpointing: Literal["full", "selective", "none"] = "full"
    flash: bool = True
    loss_tile_tokens: int = 0
    mlp_tile_tokens: int = 0
    logit_bytes: float = 14.0
    length_variation: float = 0.0
    mean_square_tokens: float = 0.0
    labelled_share: float = 1.0
    largest_labelled_share: float = 1.0
    mean_length_tokens: float = 0.0

    def with_data(self, data: DataShape, whole_packs: bool) -> Workload:
        """Return the workload with the statistics of given data.

        Args:
            data: Statistics of the data.
            whole_packs: Whether attention crosses document boundaries within a pack.
        """
        # With sequence parallelism one worker may have all labels of a row.
        largest = min(1.0, data.largest_labelled_share * self.sequence_parallel_size)
        seen = 0.0 if whole_packs else min(data.document_tokens, float(self.length_tokens))
        return replace(
            self,
            mean_square_tokens=seen,
            labelled_share=data.labelled_share,
            largest_labelled_share=largest,
            mean_length_tokens=data.pack_tokens,
        )

    def at_mean_length(self) -> Workload:
        """Return the workload with rows of the mean length, which gives its time; the longest need memory."""
        if not self.mean_length_tokens:
            return self
        shortest = -(-self.sequence_parallel_size // self.micro_batch_size)  # one token per worker
        return replace(
            self, length_tokens=max(shortest, round(self.mean_length_tokens)), mean_length_tokens=0.0
        )

    @property
    def tokens(self) -> int:
        """Tokens per micro-batch and worker."""
        return self.micro_batch_size * self.length_tokens // self.sequence_parallel_size

    @property
    def offload_optimizer(self) -> bool:
        """Whether optimizer state is offloaded."""
        return self.offload.optimizer != "none"

    @property
    def offload_param(self) -> bool:
        """Whether parameters are offloaded."""
        return self.offload.parameters != "none"

    @property
    def adapted_linears(self) -> tuple[Linear, ...]:
        """Linear modules of a layer that have adapters."""
        if self.method == "full":
            return ()
        return target_linears(self.model.parameters.linears, self.targets)

    @property
    def num_adapter_params(self) -> int:
        """Number of adapter parameters."""
        return self.model.parameters.adapters(self.rank, self.adapted_linears)

    @property
    def num_copied_params(self) -> int:
        """Number of parameters in trained copies of embedding and LM head."""
        found = self.model.parameters
        return found.embedding + found.head if self.method == "lora" and self.train_embeddings else 0

    @property
    def num_trainable_params(self) -> int:
        """Number of parameters with a gradient."""
        return (
            self.model.parameters.total
            if self.method == "full"
            else self.num_adapter_params + self.num_copied_params
        )

    @property
    def attended_tokens(self) -> float:
        """Length of a token's document, averaged over tokens; the row length if documents are unknown."""
        return self.mean_square_tokens or float(self.length_tokens)
