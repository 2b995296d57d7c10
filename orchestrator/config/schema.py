"""The job file as values: frozen models that say what to train.

Reading order starts here. A `JobSpec` holds no decision of the planner and touches nothing outside itself:
building one opens no file, asks no network and starts no process. `orchestrator.config.validation` says which
fields go together, and `orchestrator.config.loader` reads a job from YAML.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_serializer,
)
from pydantic_core import PydanticCustomError

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
Device = Literal["auto", "cuda", "cpu"]
Offload = Literal["none", "cpu"]
OffloadState = Literal["none", "cpu", "nvme"]
Format = Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "text", "tokens"]

LARGEST = 2**31 - 1  # what a 32-bit index reaches; a larger count is a slip

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[\w.\-]+$")]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Place = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]  # no file system can store a NUL


def _one_problem(value: object, judge: ValidatorFunctionWrapHandler) -> object:
    """Let a value that is neither of two kinds have one error, where pydantic gives one for each kind."""
    try:
        return judge(value)
    except ValidationError:
        raise PydanticCustomError("port", "auto, or a whole number from 0 to 65535") from None


Port = Annotated[Annotated[int, Field(ge=0, le=65535)] | Literal["auto"], WrapValidator(_one_problem)]
Checkpointing = Annotated[
    Literal["full", "selective", "none"],
    BeforeValidator(
        lambda value: {True: "full", False: "none"}[value] if isinstance(value, bool) else value,
        json_schema_input_type=bool | Literal["full", "selective", "none"],
    ),
]


class Section(BaseModel):
    """A part of the job file: frozen, without unknown keys, types as written."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSpec(Section):
    """Which model, in which number format, and how its attention is computed."""

    path: Place
    """Folder in Hugging Face format, a hub name, or builtin/tiny-llama (ships with this package)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` initialises from the configuration and run.seed instead of loading weights."""
    dtype: Dtype = "auto"
    """Number format of weights and activations; auto is bf16 on CUDA and fp32 on CPU."""
    attention: Literal["auto", "flash", "sdpa"] = "auto"
    """Kernel of the per-document attention; auto is flash on CUDA and sdpa on CPU."""
    gradient_checkpointing: Checkpointing = "full"
    """full (or true) keeps only each layer's input and recomputes the layer in the backward pass; selective
    keeps what matrix products and attention gave and recomputes the rest; none (or false) keeps all."""
    loss_tile_tokens: Count | None = None
    """Score labels so many at a time and compute each tile's logits again in the backward pass, so that
    memory never holds the logits of all; null scores all at once."""
    mlp_tile_tokens: Count | None = None
    """Run each MLP on so many tokens at a time and compute each tile again in the backward pass, so that
    memory never holds the MLP's inner activations of all; null runs it on all at once."""
    resize_embeddings: bool = False
    """Add rows to embedding and LM head until every token of the tokenizer has one; each starts as the mean
    of the others. With lora it needs method.train_embeddings, which trains and saves them."""
    trust_remote_code: bool = False
    """Allow Python code from the model's own repository to run."""


class MethodSpec(Section):
    """Which parameters are trained."""

    type: Literal["full", "lora"] = "full"
    """full trains every parameter; lora trains two narrow matrices beside each of the targets, and nothing
    else."""
    rank: Annotated[int, Field(ge=1, le=65_536)] = 8
    """Width of the two matrices (lora)."""
    alpha: float = Field(default=16.0, gt=0.0)
    """Their product is multiplied by alpha / rank (lora)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of dropping an input of the two matrices (lora)."""
    targets: Literal["all-linear", "attention"] | tuple[Name, ...] = "all-linear"
    """all-linear: every linear layer but the LM head; attention: those inside attention; or a list of names
    of modules, such as [q_proj, v_proj] (lora)."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that a large rank does not learn more slowly (rsLoRA)."""
    use_dora: bool = False
    """Learn length and direction of each weight apart (DoRA)."""
    adapter: Place | None = None
    """Folder of an adapter in peft's format, such as a run exports, to start from; null starts from a new
    one (lora)."""
    train_embeddings: bool = False
    """Train embedding and LM head as well, whole, and save them with the adapter (lora)."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Load the frozen weights of linear layers in 4 or 8 bits, through bitsandbytes (lora)."""
    double_quantization: bool = True
    """Quantise the scales of nf4 blocks as well."""


class SourceSpec(Section):
    """One data set."""

    path: Place
    """JSON, JSONL (also .gz, .zst), Parquet or Arrow file; a folder of them; a saved data set; a URI
    (s3://...); a data set of the hub; or builtin/alpaca_sample and builtin/alpaca_sample_eval, which ship
    with this package."""
    format: Format = "auto"
    """What a row holds; auto tells it from the names of its fields."""
    split: Name | None = None
    """Split of a data set of several; train for one of the hub."""
    subset: Name | None = None
    """Configuration of a data set of the hub."""
    revision: Name | None = None
    """Commit or tag of a data set of the hub."""
    weight: float = Field(default=1.0, gt=0.0, le=1.0e6)
    """Passes over the rows in an epoch: 0.5 reads a half of them, drawn by run.seed, 2.5 all twice and a
    half."""
    repeat: Count = 1
    """How often every row is read in an epoch; multiplies weight."""
    sample: Count | None = None
    """Use only this many rows, drawn by run.seed."""


class DataSpec(Section):
    """What is read, and how rows become packs of max_length tokens."""

    train: tuple[SourceSpec, ...] = Field(min_length=1)
    """The training data."""
    max_length: Annotated[int, Field(ge=16, le=LARGEST)] = 2048
    """Tokens in a pack."""
    packing: Literal["none", "best_fit", "concat"] = "best_fit"
    """best_fit puts whole documents together; concat joins all and cuts at every max_length; none pads
    each."""
    cross_document_attention: bool = False
    """true lets tokens attend to other documents of their pack, as XTuner's published profile does."""
    truncation: Literal["right", "left", "drop", "split"] = "right"
    """What happens to a row longer than max_length: keep its start, keep its end, leave it out, or go on with
    it in another pack, where nothing attends to the part before."""
    loss_on: Literal["response", "all", "last_turn"] = "response"
    """Which tokens are trained on: all answers, every token, or the last answer of a conversation."""
    template: Literal["auto", "chat", "alpaca"] = "auto"
    """chat: the tokenizer's chat template; alpaca: Stanford Alpaca's prompt; auto: chat if there is one."""
    empty_answers: Literal["skip", "error", "learn_end"] = "skip"
    """What happens to answers without text: skip learns nothing of them, and leaves out and counts the rows
    that have nothing else to learn (rows_empty); error refuses such answers as malformed rows are refused;
    learn_end learns that the answer ends at once. With loss_on: all a row is empty only without any text."""
    malformed_rows_allowed: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    """Rows that are none are left out and listed; more than this many end the run."""
    balance_window_steps: Count = 32
    """Packs of like attention cost share a step inside a window of so many steps; 1 leaves that to chance."""


class ParallelSpec(Section):
    """How the work is spread over devices."""

    workers: Annotated[int, Field(ge=1, le=65_536)] = 1
    """Number of worker processes, one per GPU (per CPU slot on CPU)."""
    device: Device = "auto"
    """auto takes the GPUs of the cluster where there are any."""
    cpus_per_worker: Count = 1
    """CPU cores that Ray reserves for each worker."""
    sequence_parallel_size: Count = 1
    """How many workers share one sequence."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """0 partitions nothing, 1 optimizer state, 2 gradients too, 3 the parameters too."""
    offload_optimizer: OffloadState = "none"
    """cpu keeps optimizer state in host memory, and steps there; nvme (zero_stage 3) keeps it on a disk of
    the node, and passes it through host memory for the step."""
    offload_param: OffloadState = "none"
    """cpu keeps the parameters in host memory, nvme on a disk of the node (zero_stage 3 with
    offload_optimizer: cpu or nvme)."""
    offload_path: Place | None = None
    """Folder on a fast disk that every node has, for what goes to nvme; a run removes what it wrote there."""
    offload_activations: Offload = "none"
    """cpu keeps each layer's input, all that gradient_checkpointing: full keeps, in host memory."""
    expandable_segments: bool = True
    """Let CUDA's allocator grow its segments, which wastes less memory where sizes vary; no effect on CPU."""


class OptimSpec(Section):
    """Batch sizes, learning rate and how long to train."""

    lr: float = Field(default=2.0e-5, gt=0.0)
    """Peak learning rate."""
    micro_batch_size: Count = 1
    """Packs in one forward and backward pass of a worker."""
    global_batch_size: Count = 8
    """Packs in one optimizer step over all workers."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at zero."""
    warmup_ratio: Fraction = 0.03
    """Share of all steps in which the learning rate rises linearly from zero."""
    max_steps: Count | None = None
    """Optimizer steps; null means epochs decide."""
    epochs: float = Field(default=1.0, gt=0.0, le=1.0e6)
    """Passes over the packs."""
    clip_norm: float = Field(default=1.0, ge=0.0)
    """Largest gradient norm; 0 does not clip."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "muon"] = "adamw"
    """adamw keeps its state in fp32; with offload_optimizer it is DeepSpeed's CPU Adam. adamw_8bit keeps the
    moments in 8 bits, paged_ in memory that CUDA moves to the host when it runs short (bitsandbytes). muon
    takes steps of orthogonal matrices inside the layers, and adamw's elsewhere."""
    muon_lr: float | None = Field(default=None, gt=0.0)
    """Peak learning rate of the matrices inside the layers, in units of a step's singular values (muon)."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1.0e-8, gt=0.0)
    """Added to the denominator of the update."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Decoupled weight decay, on every parameter."""

    def packs(self, packs: int) -> int:
        """Return the packs of all steps together, where an epoch has so many; a part of one counts as one."""
        if self.max_steps is not None:
            return self.max_steps * self.global_batch_size
        return max(1, math.ceil(round(self.epochs * packs, 6)))

    def steps(self, packs: int) -> int:
        """Return the optimizer steps, where an epoch has so many packs; the last one may hold fewer packs."""
        return math.ceil(self.packs(packs) / self.global_batch_size)


class EvalSpec(Section):
    """Held-out rows whose loss is measured during training."""

    data: tuple[SourceSpec, ...] = Field(min_length=1)
    """The held-out data."""
    every_steps: Count | None = None
    """Evaluate after every so many steps; null means only at the end."""


class CheckpointSpec(Section):
    """Where the run lives and how often it is saved."""

    storage: Place = "runs"
    """Folder that every node can read and write; the run's folder is STORAGE/NAME."""
    every_steps: Count | None = None
    """Save after every so many steps; null means only at the end."""
    keep: Count = 2
    """How many checkpoints stay."""
    asynchronous: bool = False
    """Upload in the background."""


class RunSpec(Section):
    """What happens when something fails."""

    max_failures: Annotated[int, Field(ge=0, le=LARGEST)] = 3
    """How often the worker group is started again from the last checkpoint."""
    min_workers: Count | None = None
    """Go on with fewer workers, down to this many; null waits for all of them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1024
    """Seed of initialisation, packing and order."""
    collective_timeout_seconds: Annotated[int, Field(ge=10, le=604_800)] = 600
    """A collective that waits longer ends the attempt."""
    stop_grace_seconds: Annotated[int, Field(ge=0, le=604_800)] = 20
    """How long a run that is told to stop (SIGTERM, SIGHUP) may take to save the step it is at; Kubernetes
    and Slurm kill what has not ended after 30 s, unless they are told otherwise."""
    env: dict[EnvironmentName, SecretStr | None] = Field(default_factory=dict)
    """Environment variables of the driver, its tasks and its workers, NAME: value; null takes the value from
    where the command runs. Values are recorded nowhere: job.yaml of the run lists names only."""

    @field_serializer("env")
    def _names_only(self, env: dict[str, SecretStr | None]) -> dict[str, None]:
        return dict.fromkeys(env)


class MetricsSpec(Section):
    """Where the run's numbers are found, besides its folder."""

    port: Port | None = "auto"
    """Port of the endpoint on the driver's node: auto takes the first free one of 9400 to 9499, a number
    only that one, 0 any free one; null opens none."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address that the endpoint listens on; 0.0.0.0 for scraping from other machines."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """What else draws them: tensorboard into the run's folder; wandb and mlflow where their environment
    variables say."""
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
