"""What is to be trained and how: frozen values from which memory and time are predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestrator.arch.model_dims import ModelDims
from orchestrator.arch.parameters import Linear, Parameters, parameters, target_linears
from orchestrator.planner.host_memory import NO_OFFLOAD, Offload

Quantization = Literal["none", "nf4", "int8", "gptq-int4", "gptq-int8"]


@dataclass(frozen=True)
class Model:
    """A model's sizes.

    Attributes:
        shape: What FLOPs and activations depend on.
        parameters: What its weights are.
    """

    shape: ModelDims
    parameters: Parameters

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Model | None:
        """Return the sizes that a config.json describes; None for a family that is not known."""
        shape, counted = ModelDims.from_config(config), parameters(config)
        return None if shape is None or counted is None else cls(shape, counted)


@dataclass(frozen=True)
class DataShape:
    """What is known of the data that is trained.

    Attributes:
        document_tokens: How many tokens a token's document has, on average; 0 where that is not known.
        labelled_share: Share of all slots whose token is a target of the loss.
        largest_labelled_share: The same of the pack that has most.
    """

    document_tokens: float = 0.0
    labelled_share: float = 1.0
    largest_labelled_share: float = 1.0


UNKNOWN_DATA = DataShape()


@dataclass(frozen=True)
class Workload:
    """One way to train a model.

    Attributes:
        model: Its sizes.
        length_tokens: Tokens of a row, over all workers that share it.
        micro_batch_size: Rows of a worker's micro-batch.
        gradient_accumulation_steps: Micro-batches of an optimizer step.
        world_size: Workers.
        gpus_per_node: Workers of a node.
        sequence_parallel_size: Workers that share a row.
        method: Whether all parameters are trained, or adapters.
        rank: Width of adapters.
        targets: What they stand beside, as in a job file.
        train_embeddings: Whether adapters come with copies of embedding and head that are trained.
        quantization: Bits of frozen weights.
        casts_frozen_to_fp32: Whether frozen weights that are not quantized are kept in fp32, as
            `peft.prepare_model_for_kbit_training` does for bitsandbytes.
        element_bytes: Of a weight and an activation: 2, or 4 for fp32.
        master_weights: Whether the optimizer keeps fp32 copies of 16-bit weights.
        adapter_bytes: Of a weight of an adapter.
        optimizer_bytes: Of the optimizer's state of a parameter, without the fp32 copy.
        zero_stage: Stage of ZeRO.
        offload: Where the optimizer's state and the parameters are.
        offload_activations: Whether what checkpointing keeps is in host memory.
        checkpointing: What is kept of each layer, as in a job file.
        flash: Whether attention never holds the scores.
        loss_tile_tokens: Tokens scored at a time; 0 for all.
        mlp_tile_tokens: Tokens of a tile of the MLP; 0 for all.
        logit_bytes: Bytes of all that the loss holds for each logit.
        length_variation: Share of micro-batches that are shorter than the longest: 0 for packs of one length.
        mean_square_tokens: Tokens that attention counts as seen by a row's tokens, on average: the documents'
            squared lengths over the tokens; 0 for attention over the whole row.
        labelled_share: Share of tokens that the LM head scores.
        largest_labelled_share: The largest share that it scores in a worker's micro-batch.
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

    def over(self, data: DataShape, whole_packs: bool) -> Workload:
        """Return the same over data of which something is known.

        Args:
            data: What is known.
            whole_packs: Whether the documents of a pack see each other.
        """
        # Of those who share a row, one may have all its labels.
        largest = min(1.0, data.largest_labelled_share * self.sequence_parallel_size)
        seen = 0.0 if whole_packs else min(data.document_tokens, float(self.length_tokens))
        return replace(
            self,
            mean_square_tokens=seen,
            labelled_share=data.labelled_share,
            largest_labelled_share=largest,
        )

    @property
    def tokens(self) -> int:
        """Tokens of a worker's micro-batch."""
        return self.micro_batch_size * self.length_tokens // self.sequence_parallel_size

    @property
    def offload_optimizer(self) -> bool:
        """Whether the optimizer's state is off the GPU."""
        return self.offload.optimizer != "none"

    @property
    def offload_param(self) -> bool:
        """Whether the parameters are."""
        return self.offload.parameters != "none"

    @property
    def adapted(self) -> tuple[Linear, ...]:
        """Linears of a layer beside which adapters stand."""
        if self.method == "full":
            return ()
        return target_linears(self.model.parameters.linears, self.targets)

    @property
    def adapters(self) -> int:
        """Parameters of all adapters."""
        return self.model.parameters.adapters(self.rank, self.adapted)

    @property
    def copies(self) -> int:
        """Parameters of embedding and head that are trained beside adapters."""
        found = self.model.parameters
        return found.embedding + found.head if self.method == "lora" and self.train_embeddings else 0

    @property
    def trained(self) -> int:
        """Parameters that have a gradient."""
        return self.model.parameters.total if self.method == "full" else self.adapters + self.copies

    @property
    def attended_tokens(self) -> float:
        """Squared lengths over tokens: how many tokens attention is counted for at each."""
        return self.mean_square_tokens or float(self.length_tokens)
