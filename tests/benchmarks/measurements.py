"""Published measurements in one CSV schema, and the assumptions for values that a page does not state.

Assumptions depend on the software stack behind a page (`STACKS`), never on a row: whether DeepSpeed was used,
the dtype of the loss, the distribution of lengths, and whether memory was reported by torch or by nvidia-smi,
which includes the CUDA context.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.arch.registry import require_bundled
from orchestrator.planner.host_memory import Offload
from orchestrator.planner.memory import CONTEXT_BYTES
from orchestrator.planner.workload import Model, Workload

_UNKNOWN = ("", "unknown")
_QUANTIZATIONS = {"none": "none", "bnb-nf4": "nf4", "bnb-int8": "int8", "nf4": "nf4", "int8": "int8",
                  "gptq-int4": "gptq-int4", "gptq-int8": "gptq-int8"}  # fmt: skip
_CHECKPOINTING: Mapping[str, Literal["none", "selective"]] = {"no": "none", "selective": "selective"}
_ATTENTION_IN = {"qwen": ("c_attn",), "chatglm": ("query_key_value",), "baichuan": ("W_pack",),
                 "bloom": ("query_key_value",), "phi3": ("qkv_proj",)}  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """Defaults of the software behind a page, for values that its rows do not state.

    Attributes:
        full_stage: ZeRO stage for full parameters; adapters run without DeepSpeed.
        full_masters: Whether full parameters have fp32 master weights.
        mean_tokens: Mean row length in tokens before truncation; None if every row has the maximum length.
        cut_tokens: Mean row length in tokens after truncation, if stated.
        quantized_dtype: Compute dtype with a quantized base model, if it differs from the stated dtype.
        has_context: Whether memory values include the CUDA context.
        rank: Rank of adapters.
        targets: Target modules of adapters.
        whole_rows_attend: Whether tokens attend to the whole row, as in all of these pages.
    """

    full_stage: int = 3
    full_masters: bool = True
    mean_tokens: float | None = None
    cut_tokens: float | None = None
    quantized_dtype: str | None = None
    has_context: bool = True
    rank: int = 8
    targets: str | tuple[str, ...] = "attention inputs"
    whole_rows_attend: bool = True


STACKS: Mapping[str, Stack] = {
    # peft and transformers on one GPU; memory reported by nvidia-smi.
    "llama2-lora-3090": Stack(targets=("q_proj", "v_proj")),
    # transformers' Trainer; the page states that Q-LoRA runs in fp16.
    "qwen-finetune": Stack(quantized_dtype="fp16"),
    # 16-bit AdamW without fp32 master weights; rows of 3,200 tokens on average; torch's max_memory_reserved.
    "ms-swift-benchmark": Stack(full_stage=0, full_masters=False, mean_tokens=3200.0, has_context=False),
    # Mean row length 725 tokens after truncation to 1,024; QLoRA's default target modules.
    "llm-action-throughput": Stack(mean_tokens=800.0, cut_tokens=725.0, targets="all-linear"),
    "xtuner-speed-benchmark": Stack(),
    # Held-out pages, not used to choose any parameter (docs/benchmarks.md). 16-bit AdamW; memory from torch.
    "litgpt-resource-tables": Stack(full_masters=False, has_context=False, targets="all-linear"),
    "torchtune-readme": Stack(full_masters=False, has_context=False, targets="all-linear"),
    "peft-method-comparison": Stack(full_masters=False, has_context=False, targets="all-linear"),
    # Adapters, or pages that publish throughput only.
    "fsdp-qlora-benchmarks": Stack(has_context=False, targets="all-linear"),
    "hf-ulysses-blog": Stack(has_context=False),
    "fms-fsdp": Stack(full_masters=False),
    "pytorch-fsdp-blog": Stack(full_masters=False),
    "vectorlm-reference-throughput": Stack(full_masters=False),
    "universal-llm-trainer-gpu-test": Stack(full_masters=False, targets="all-linear"),
}


class UnusableRow(ValueError):
    """A row cannot be predicted because its model, GPU or settings are unknown."""


@dataclass(frozen=True)
class Measurement:
    """A row of the CSV.

    Attributes:
        fields: The raw cells by column name.
    """

    fields: Mapping[str, str]

    def text(self, name: str) -> str | None:
        """Return a field, or None if it is empty or `unknown`."""
        found = (self.fields.get(name) or "").strip()
        return None if found in _UNKNOWN else found

    def number(self, name: str) -> float | None:
        """Return a field as a number, or None if it is empty or `unknown`.

        Raises:
            UnusableRow: The field is not a number.
        """
        found = self.text(name)
        try:
            return None if found is None else float(found)
        except ValueError as error:
            raise UnusableRow(f"{name}={found!r} is not a number") from error

    def whole(self, name: str, default: int) -> int:
        """Return a field as an integer, or `default` if it is empty or `unknown`."""
        found = self.number(name)
        return default if found is None else int(found)

    @property
    def name(self) -> str:
        """Id of the row."""
        return self.text("id") or "?"

    @property
    def source(self) -> str:
        """Name of the page that published the row."""
        return self.text("source") or "?"

    @property
    def memory_gib(self) -> float | None:
        """Peak memory per GPU in GiB."""
        return self.number("memory_per_gpu_gib")

    @property
    def tgs(self) -> float | None:
        """Tokens per GPU and second."""
        return self.number("tgs")

    @property
    def out_of_memory(self) -> bool:
        """Whether the configuration ran out of memory."""
        return self.text("out_of_memory") == "yes"

    @property
    def stack(self) -> str:
        """Key of the software stack that calibration parameters belong to: page, quantization and method."""
        kind = self.text("quantization") or "none"
        quantized = kind if kind == "none" else kind.split("-")[0]
        copies = " with embeddings" if self.text("trains_embeddings") == "yes" else ""
        # A page may have adapters with and without a multi-node launch or ZeRO-3; each is a separate stack.
        apart = ""
        if self.text("method") != "full":
            apart = (" between nodes" if self.spans_nodes else "") + (
                " in ZeRO-3" if self.text("zero_stage") == "3" else ""
            )
        return f"{self.source}, {quantized} {self.text('method')}{copies}{apart}"

    @property
    def spans_nodes(self) -> bool:
        """Whether the workers are on several nodes."""
        return self.whole("num_nodes", 1) > 1


def read(path: Path) -> list[Measurement]:
    """Return the rows of a CSV file in the schema."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return [Measurement(row) for row in csv.DictReader(lines)]


def workload_of_row(row: Measurement) -> Workload:
    """Return the workload of a row, with the defaults of its stack for values that it does not state.

    Raises:
        UnusableRow: The model, quantization or sizes of the row are unknown.
    """
    stack = STACKS.get(row.source, Stack(targets="all-linear"))
    config = _config(row)
    model = Model.from_config(config)
    if model is None:
        raise UnusableRow(f"the layers of model {row.text('model')!r} are not known")
    quantization = _QUANTIZATIONS.get(row.text("quantization") or "none")
    length = row.whole("max_length", 0)
    if quantization is None or length < 1:
        raise UnusableRow(f"quantization={row.text('quantization')!r}, max_length={length}: not known")
    per_node = row.whole("gpus_per_node", 1)
    world = row.whole("num_nodes", 1) * per_node
    full = row.text("method") == "full"
    stage = row.whole("zero_stage", stack.full_stage if full else 0)
    rows = row.whole("micro_batch_size", 1)  # rows of a micro-batch, padded to the longest
    work = Workload(
        model=model,
        length_tokens=length,
        micro_batch_size=rows,
        gradient_accumulation_steps=row.whole("gradient_accumulation_steps", 1),
        world_size=world,
        gpus_per_node=per_node,
        sequence_parallel_size=row.whole("sequence_parallel_size", 1),
        method="full" if full else "lora",
        rank=row.whole("lora_rank", stack.rank),
        targets=_targets(row, stack, str(config["model_type"])),
        train_embeddings=row.text("trains_embeddings") == "yes",
        quantization=quantization,  # type: ignore[arg-type]
        element_bytes=4 if row.text("dtype") == "fp32" else 2,
        master_weights=full and stack.full_masters,
        zero_stage=stage,
        offload=Offload(
            "cpu" if "optimizer" in (row.text("offload") or "") else "none",
            "cpu" if "param" in (row.text("offload") or "") else "none",
        ),
        checkpointing=_CHECKPOINTING.get(row.text("gradient_checkpointing") or "", "full"),
        flash=row.text("flash_attention") == "yes",
        length_variation=length_variation(stack.mean_tokens, length) ** rows,
    )
    dtype = (stack.quantized_dtype if quantization != "none" else None) or row.text("dtype")
    # DeepSpeed's fp16 engine has no autocast: logits, shifted copy, log-softmax and gradient have 2 bytes per
    # element; the copy is freed before the gradient is allocated, so the peak is between 6 and 8 bytes.
    if stage and dtype == "fp16":
        return replace(work, logit_bytes=7.0)
    # With bitsandbytes, peft casts the head to fp32, so each of the four has 4 bytes per element.
    return replace(work, logit_bytes=16.0) if quantization in ("nf4", "int8") else work


def timed_workload_of_row(row: Measurement) -> tuple[Workload, float]:
    """Return the workload with padded length, and the tokens per micro-batch that the page's TGS counts.

    Rows of a micro-batch are padded to the longest. For b rows with mean m below a limit L, the longest is
    estimated as L - (L - m) / b tokens.

    Raises:
        UnusableRow: See `workload_of_row`.
    """
    work, mean = workload_of_row(row), STACKS.get(row.source, Stack()).cut_tokens
    if mean is None or mean >= work.length_tokens:
        return work, float(work.tokens)
    longest = work.length_tokens - (work.length_tokens - mean) / work.micro_batch_size
    return replace(work, length_tokens=int(longest)), mean * work.micro_batch_size


def context_bytes(row: Measurement) -> float:
    """Return the bytes of the CUDA context, or 0 if the memory values of the page exclude it."""
    return CONTEXT_BYTES if STACKS.get(row.source, Stack()).has_context else 0.0


def length_variation(mean_tokens: float | None, limit: int) -> float:
    """Return the share of rows shorter than a limit, for log-normal lengths with sigma 0.5.

    Args:
        mean_tokens: Mean length in tokens before truncation; None if all rows have the length `limit`.
        limit: Length in tokens to which rows are truncated.
    """
    if mean_tokens is None:
        return 0.0
    spread = 0.5
    # P(length < limit) with log(length) ~ N(log(mean) - spread^2 / 2, spread^2).
    above = math.log(limit / mean_tokens) / spread + spread / 2
    return 0.5 * (1.0 + math.erf(above / math.sqrt(2.0)))


def _config(row: Measurement) -> Mapping[str, Any]:
    try:
        return require_bundled(row.text("model") or "")
    except ValueError as error:
        raise UnusableRow(str(error)) from error


def _targets(row: Measurement, stack: Stack, family: str) -> str | tuple[str, ...]:
    stated = row.text("lora_targets")
    if stated == "all-linear":
        return stated
    if stated is None or stated.startswith("framework default"):
        if stack.targets != "attention inputs":
            return stack.targets
        return _ATTENTION_IN.get(family, ("q_proj", "k_proj", "v_proj"))
    return tuple(name.strip() for name in stated.split(","))
