"""The schema of a job file: frozen pydantic models.

Reading order starts here. A `JobSpec` holds what the user wrote and no decision of the planner; building one
opens no file, uses no network and starts no process. `orchestrator.config.validation` checks rules between
fields, and `orchestrator.config.loader` reads a job from YAML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    field_serializer,
)

from orchestrator.config.field_types import (
    LARGEST,
    ChatTemplate,
    Checkpointing,
    Count,
    Decay,
    Device,
    Dtype,
    EnvironmentName,
    Format,
    Fraction,
    Name,
    Offload,
    OffloadState,
    PathStr,
    Port,
    Role,
    RowField,
    SplitName,
    TemplateOptions,
    TurnField,
)


class Section(BaseModel):
    """A section of the job file: frozen, no unknown keys, no type coercion."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSpec(Section):
    """The model: path, dtype, attention, recomputation."""

    path: PathStr
    """Folder in Hugging Face format, hub name, or builtin/tiny-llama, which ships with this package."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """random initializes weights from the configuration and run.seed instead of loading them."""
    dtype: Dtype = "auto"
    """Dtype of weights and activations; auto is bf16 on CUDA and fp32 on CPU."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """Attention backend; auto is flash on CUDA and sdpa on CPU."""
    gradient_checkpointing: Checkpointing = "full"
    """full (or true) saves each layer's input and recomputes the layer in the backward pass; selective saves
    matmul and attention outputs and recomputes the rest; none (or false) saves all activations."""
    loss_tile_tokens: Count | None = None
    """Labelled tokens per tile of the loss: logits are computed tile by tile and recomputed in the backward
    pass, so that memory never holds all logits; null computes them at once."""
    mlp_tile_tokens: Count | None = None
    """Tokens per tile of each MLP, recomputed in the backward pass, so that memory never holds all of the
    MLP's inner activations; null runs the MLP on all tokens at once."""
    new_special_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Special tokens to add to the tokenizer, if it lacks them; saved with the export."""
    resize_embeddings: bool = False
    """Add rows to the embedding and LM head for tokens of the tokenizer that have none, initialized to the
    mean of the existing rows. With lora, method.train_embeddings is required, which trains and saves them."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository."""


class MethodSpec(Section):
    """Which parameters are trained."""

    type: Literal["full", "lora"] = "full"
    """full trains every parameter; lora adds trainable low-rank matrices to each target module and freezes
    everything else."""
    rank: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Rank of the low-rank matrices (lora)."""
    alpha: float = Field(default=16.0, gt=0.0)
    """The low-rank product is scaled by alpha / rank (lora)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout probability on the input of the low-rank matrices (lora)."""
    target_modules: Literal["all-linear", "attention"] | tuple[Name, ...] = "all-linear"
    """Modules that get adapters: all-linear (every linear layer except the LM head), attention (linear layers
    of attention), or a list of module names such as [q_proj, v_proj] (lora)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that a large rank does not learn more slowly (rsLoRA)."""
    use_dora: bool = False
    """Train magnitude and direction of each weight separately (DoRA)."""
    adapter: PathStr | None = None
    """Folder of a peft adapter to start from, such as an export of a run; null starts from a new one
    (lora)."""
    train_embeddings: bool = False
    """Also train the whole embedding and LM head, and save them with the adapter (lora)."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Quantize the frozen linear weights to 4 bits (nf4) or 8 bits (int8) with bitsandbytes (lora)."""
    double_quantization: bool = True
    """Quantize the block scales of nf4 as well."""


class SourceSpec(Section):
    """One data set."""

    path: PathStr
    """JSON, JSON lines, CSV, TSV, text (these also .gz, .zst, .bz2, .xz), Excel, Parquet or Arrow file; a
    folder of them, or a pattern (data/*.jsonl, data/**/*.csv); a saved data set; a URI (s3://...); a data set
    of the hub; or builtin/alpaca_sample and builtin/alpaca_sample_eval, which ship with this package."""
    format: Format = "auto"
    """Format of the rows; auto detects it from the field names."""
    columns: dict[str, RowField | TurnField | None] = Field(default_factory=dict)
    """The field of each column with another name, such as {question: instruction, reply: output}; null leaves
    a column out. Keys of messages too: {dialog: messages, speaker: role, words: content}."""
    roles: dict[str, Role] = Field(default_factory=dict)
    """The role of messages whose role has another name, such as {customer: user, agent: assistant};
    function_call is a message whose content is a tool call."""
    field: Annotated[str, Field(min_length=1)] | None = None
    """List of a JSON file's object that has the rows, or sheet of a workbook; null finds the only one."""
    split: SplitName | None = None
    """Split of the data set, such as train or a part of it such as train[:1000] or train[10%:20%]; for a hub
    data set the default is train."""
    subset: Name | None = None
    """Configuration of a data set of the hub."""
    revision: Name | None = None
    """Commit or tag of a data set of the hub."""
    weight: float = Field(default=1.0, gt=0.0, le=1.0e6)
    """Sampling weight per epoch: 0.5 uses a random half (seeded by run.seed), 2.5 every row twice plus a
    random half."""
    repeat: Count = 1
    """Repetitions of every row in an epoch; multiplies weight."""
    sample: Count | None = None
    """Use a random subset of this many rows, seeded by run.seed."""


class DataSpec(Section):
    """Data sources, and how rows are packed to max_length tokens."""

    train: tuple[SourceSpec, ...] = Field(min_length=1)
    """The training data."""
    max_length: Annotated[int, Field(ge=16, le=LARGEST)] = 2048
    """Tokens of a pack, at most."""
    packing: Literal["none", "best_fit", "concat"] = "best_fit"
    """best_fit packs whole documents; concat concatenates all documents and cuts at every max_length; none
    makes each document a pack of its own, without padding."""
    pad_to: Literal["max_length"] | None = None
    """max_length pads the packs of packing: none to max_length slots, as trainers without packing do; packs
    of best_fit and concat always have max_length slots."""
    cross_document_attention: bool = False
    """true lets tokens attend to other documents of their pack, as XTuner's published benchmark does."""
    truncation: Literal["right", "left", "drop", "split"] = "right"
    """For a row longer than max_length: right keeps its start, left keeps its end, drop skips the row, split
    continues it in another pack, without attention to the part before."""
    loss_on: Literal["response", "all", "last_turn"] = "response"
    """Tokens with a loss: those of all responses, all tokens, or those of the last response."""
    chat_template: ChatTemplate = "auto"
    """chat: the tokenizer's chat template; alpaca: the Stanford Alpaca prompt; auto: chat if the tokenizer
    has a template, else alpaca; or the name (chatml, llama3, qwen, ...), the file or the text of a template
    that replaces the tokenizer's."""
    template_options: TemplateOptions = Field(default_factory=dict)
    """Variables of the chat template, such as enable_thinking, and the date that it writes, as 2026-01-01."""
    system_prompt: str = ""
    """System message of rows that have none."""
    append_eos: bool = False
    """End the last answer of a row with the tokenizer's EOS token where the chat template ends it with no
    token that ends a turn, so that the model learns to stop."""
    empty_answers: Literal["skip", "error", "learn_end"] = "skip"
    """For answers without text: skip computes no loss on them, and skips and counts rows without any other
    trained token (rows_empty); error treats them as malformed rows; learn_end trains the end-of-turn token.
    With loss_on: all, only a row without any text is empty."""
    malformed_rows_allowed: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Maximum number of malformed rows to skip; the run fails if there are more."""
    deduplicate: bool = False
    """Leave out rows whose tokens and labels equal those of an earlier row, over all sources in order."""
    balance_window_steps: Count = 32
    """Steps within which packs are reordered so that packs of one step have similar attention cost; 1 turns
    balancing off."""

    @property
    def pads_packs(self) -> bool:
        """Whether every pack has max_length slots."""
        return self.packing != "none" or self.pad_to == "max_length"


class ParallelSpec(Section):
    """Parallelism: workers, ZeRO, offload, sequence parallelism."""

    workers: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Number of worker processes, one per GPU; on CPU, one per cpus_per_worker cores."""
    device: Device = "auto"
    """auto uses CUDA if the cluster has GPUs, else CPU."""
    cpus_per_worker: Count = 1
    """CPU cores that Ray reserves for each worker."""
    sequence_parallel_size: Count = 1
    """Number of workers that share each sequence (Ulysses)."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """ZeRO stage: 0 partitions nothing, 1 optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: OffloadState = "none"
    """cpu keeps optimizer states in host memory and runs the step there; nvme (zero_stage: 3) keeps them on a
    disk of the node and moves them through host memory for the step."""
    offload_param: OffloadState = "none"
    """cpu keeps parameters in host memory, nvme on a disk of the node (requires zero_stage: 3 and
    offload_optimizer: cpu or nvme)."""
    offload_path: PathStr | None = None
    """Folder on a fast disk of every node for offload to nvme; a run removes the files it wrote there."""
    offload_activations: Offload = "none"
    """cpu keeps the saved layer inputs of gradient_checkpointing: full in host memory."""
    expandable_segments: bool = True
    """Use expandable segments in the CUDA allocator, which reduces fragmentation; no effect on CPU."""


class OptimSpec(Section):
    """Batch sizes, learning rate and how long to train."""

    lr: float = Field(default=2.0e-5, gt=0.0)
    """Peak learning rate."""
    micro_batch_size: Count = 1
    """Packs per forward and backward pass of a worker."""
    global_batch_size: Count = 8
    """Packs per optimizer step over all workers."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after warm-up; cosine and linear decay to zero."""
    warmup_ratio: Fraction = 0.03
    """Fraction of all steps with linear warm-up from zero."""
    max_steps: Count | None = None
    """Number of optimizer steps; null derives it from epochs."""
    epochs: float = Field(default=1.0, gt=0.0, le=1.0e6)
    """Passes over the training data."""
    max_grad_norm: float = Field(default=1.0, ge=0.0)
    """Gradient norm clipping; 0 turns it off."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"] = "adamw"
    """adamw keeps fp32 states; with offload_optimizer it is DeepSpeed's CPU Adam. adamw_8bit keeps the
    moments in 8 bits; paged_ optimizers page states to host memory under memory pressure (bitsandbytes). muon
    updates the matrices of the layers with orthogonalized momentum, and other parameters with adamw."""
    muon_lr: float | None = Field(default=None, gt=0.0)
    """Peak learning rate of the matrices that muon updates, in units of the update's singular values."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1.0e-8, gt=0.0)
    """Term added to the denominator of the update."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay, applied to every parameter."""

    def packs(self, packs: int) -> int:
        """Return the number of packs of all steps, given those of an epoch; a partial pack counts as one."""
        if self.max_steps is not None:
            return self.max_steps * self.global_batch_size
        return max(1, math.ceil(round(self.epochs * packs, 6)))

    def steps(self, packs: int) -> int:
        """Return the number of optimizer steps, given the packs of an epoch; the last may be partial."""
        return math.ceil(self.packs(packs) / self.global_batch_size)


UNION_TAGS = frozenset({"(source)", "(list)", "(sets)"})
"""Parts of pydantic's error locations that are not in the job file: members of the unions of eval.data."""


def _form_of_set(value: object) -> str:
    return "(source)" if isinstance(value, Mapping | SourceSpec) else "(list)"


def _form_of_data(value: object) -> str:
    is_mapping_of_sets = isinstance(value, Mapping) and not isinstance(value.get("path"), str)
    return "(sets)" if is_mapping_of_sets else _form_of_set(value)


_SourceList = Annotated[tuple[SourceSpec, ...], Field(min_length=1), Tag("(list)")]
_OneSource = Annotated[SourceSpec, Tag("(source)")]
_EvalSet = Annotated[_SourceList | _OneSource, Discriminator(_form_of_set)]
_EvalSets = Annotated[dict[str, _EvalSet], Tag("(sets)")]


class EvalSpec(Section):
    """Evaluation during training."""

    share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Hold out this fraction of the rows of data.train for evaluation, chosen by a hash of their content that
    is seeded by run.seed; equal rows stay on the same side."""
    data: Annotated[_SourceList | _OneSource | _EvalSets, Discriminator(_form_of_data)] | None = None
    """The evaluation data: a list of sources, or several evaluation sets (NAME: list of sources), each with a
    loss of its own."""
    every_steps: Count | None = None
    """Evaluate every N steps; null evaluates only at the end."""


class CheckpointSpec(Section):
    """Run storage and checkpoint interval."""

    storage: PathStr = "runs"
    """Folder that every node can read and write; the run's folder is STORAGE/NAME."""
    every_steps: Count | None = None
    """Save a checkpoint every N steps; null saves only at the end."""
    keep: Count = 2
    """Number of newest checkpoints to keep."""
    keep_every_steps: Count | None = None
    """Keep every checkpoint whose step is a multiple of N as well; a multiple of every_steps."""
    keep_best: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Keep the N checkpoints with the lowest evaluation loss as well (requires eval.every_steps)."""
    asynchronous: bool = False
    """Upload in the background."""


class RunSpec(Section):
    """Seed, retries, timeouts and environment variables."""

    max_failures: Annotated[int, Field(ge=0, le=LARGEST)] = 3
    """Maximum number of restarts of the worker group from the latest checkpoint."""
    min_workers: Count | None = None
    """Minimum number of workers to continue with after a failure; null waits for all."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1024
    """Seed of initialization, packing and data order."""
    collective_timeout_seconds: Annotated[int, Field(ge=10, le=604_800)] = 600
    """Timeout of a collective operation, which fails the attempt."""
    stop_grace_seconds: Annotated[int, Field(ge=0, le=604_800)] = 20
    """Time to save a checkpoint after SIGTERM or SIGHUP; Kubernetes and Slurm kill the process after 30 s by
    default."""
    env: dict[EnvironmentName, SecretStr | None] = Field(default_factory=dict)
    """Environment variables of the driver, tasks and workers, NAME: value; null takes the value from the
    environment of the command. Values are never recorded: job.yaml of the run lists only names."""

    @field_serializer("env")
    def _names_only(self, env: dict[str, SecretStr | None]) -> dict[str, None]:
        return dict.fromkeys(env)


class MetricsSpec(Section):
    """Prometheus endpoint and experiment trackers."""

    port: Port | None = "auto"
    """Port of the Prometheus endpoint on the driver's node: auto is the first free port of 9400 to 9499, 0
    any free port; null opens none."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Listen address of the endpoint; 0.0.0.0 allows scraping from other machines."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Experiment trackers: tensorboard writes to the run directory; wandb and mlflow use their environment
    variables."""
    project: Name = "orchestrator"
    """Project of Weights & Biases, experiment of MLflow."""


class JobSpec(Section):
    """One training job."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the run: letters, digits, dot, dash, underscore, at most 63."""
    model: ModelSpec
    data: DataSpec
    method: MethodSpec = MethodSpec()
    parallel: ParallelSpec = ParallelSpec()
    optim: OptimSpec = OptimSpec()
    eval: EvalSpec | None = None
    checkpoint: CheckpointSpec = CheckpointSpec()
    run: RunSpec = RunSpec()
    metrics: MetricsSpec = MetricsSpec()

    @property
    def data_parallel_size(self) -> int:
        """Number of different micro-batches that the workers hold at one time."""
        return self.parallel.workers // self.parallel.sequence_parallel_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of one worker in one optimizer step."""
        return self.optim.global_batch_size // (self.optim.micro_batch_size * self.data_parallel_size)
