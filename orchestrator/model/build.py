"""Build the model of a job: load or initialize weights, quantize, add adapters, partition under ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers import PretrainedConfig

from orchestrator.arch.parameters import ParameterCount
from orchestrator.config.paths import resolve
from orchestrator.config.schema import JobSpec, ModelSpec
from orchestrator.errors import SpecError
from orchestrator.model import attention
from orchestrator.model.activation_memory import checkpoint_layers, tile_mlps
from orchestrator.model.adapters import adapt, adapter_problem, load_adapter
from orchestrator.model.compatibility import (
    config_unsupported_reason,
    length_problem,
    model_unsupported_reason,
    muon_unsupported_reason,
    position_problem,
)
from orchestrator.model.loss import TiledHead
from orchestrator.model.quantization import (
    dequantize,
    disable_cpu_repacking,
    quantization_config,
    quantization_method,
    quantization_problem,
    stored_quantization,
)
from orchestrator.model.stored_weights import weight_files
from orchestrator.model.vocabulary import resize, resize_problem, with_tokenizer_rows
from orchestrator.model.weights import (
    ADAPTER_CONFIG,
    WeightsMismatch,
    first_problem_of_ranks,
    load_with_info,
    mismatch_problem,
    weights_problem,
    without_empty_biases,
)
from orchestrator.parallel.deepspeed_config import DeepSpeedConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CANNOT_BUILD = (OSError, ValueError, KeyError)


def torch_dtype(dtype: Literal["bf16", "fp16", "fp32"]) -> torch.dtype:
    """Return the `torch.dtype` of a dtype name of job files."""
    return _DTYPES[dtype]


def load_config(model: ModelSpec) -> PretrainedConfig:
    """Return the configuration of the trained model, with `vocab_size` after model.resize_embeddings.

    Raises:
        SpecError: transformers cannot load the configuration or the tokenizer.
    """
    return with_tokenizer_rows(stored_config(model), model)


def stored_config(model: ModelSpec) -> PretrainedConfig:
    """Return the configuration as stored with the model's weights.

    Raises:
        SpecError: The path is an adapter, or transformers cannot load its configuration.
    """
    from transformers import AutoConfig

    folder = resolve(model.path)
    if (folder / ADAPTER_CONFIG).exists():
        raise _refusal(
            model,
            f"is an adapter ({ADAPTER_CONFIG}) and not a model; name its base model in model.path, and this "
            "folder in method.adapter",
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(resolve(model.path)), trust_remote_code=model.trust_remote_code
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise SpecError(
            f"model.path={model.path} is not a model that can be loaded ({reason}); name a folder with a "
            "config.json, or a hub model"
        ) from None
    return config


def require_supported(
    job: JobSpec, reads_weights: bool = True, config: PretrainedConfig | None = None
) -> ParameterCount | None:
    """Check before training that this version can train a job's model as the job asks.

    The model is built on the meta device, so the check needs no memory for weights. Only the headers of
    weight files are read; files of a hub model are checked only if they are cached.

    Args:
        job: The job.
        reads_weights: False if a checkpoint replaces every weight, so the model's files need not exist.
        config: The result of `load_config`; loaded here if None.

    Returns:
        The parameter count including adapters; None if the model cannot be built on the meta device, in which
        case the workers check it.

    Raises:
        SpecError: The reason why the model is not supported, and the remedy.
    """
    model = job.model
    config = config or load_config(model)
    problem = config_unsupported_reason(config) or length_problem(config, job.data.max_length)
    if problem := problem or quantization_problem(config, job):
        raise _refusal(model, problem)
    try:
        built = _without_memory(model, config)
    except RuntimeError:
        return None  # remote code that needs real tensors; the workers check it
    except Exception as error:  # an inconsistent configuration can raise any class
        raise _refusal(model, _not_built(error)) from None
    problem = model_unsupported_reason(built) or position_problem(built, job.data.max_length)
    if problem := problem or resize_problem(built, model):
        raise _refusal(model, problem)
    if job.optim.optimizer == "muon" and (problem := muon_unsupported_reason(built)):
        raise _refusal(model, problem)
    if reads_weights or job.method.type == "lora":
        _require_weights(model, built, download=False)
    # From here on, apply the same options as `build_model`, because each may reject the architecture.
    _save_memory(built, model, offload_activations=False)
    trained: PreTrainedModel | PeftModel = built
    if job.method.type == "lora":
        with torch.device("meta"):
            trained = adapted = adapt(built, job.method, torch.bfloat16, job.run.seed)
        if problem := adapter_problem(adapted, job):
            raise SpecError(problem)
    if model.loss_tile_tokens:
        TiledHead(trained, model.loss_tile_tokens)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in trained.parameters()]
    return ParameterCount(
        total=sum(size for size, _ in sizes),
        trained=sum(size for size, is_trained in sizes if is_trained),
        largest=max(size for size, _ in sizes),
    )


def build_on_meta(job: JobSpec) -> PeftModel:
    """Return the model of a job with its adapters, on the meta device."""
    with torch.device("meta"):
        bare = _without_memory(job.model, load_config(job.model))
        return adapt(bare, job.method, torch.bfloat16, job.run.seed)


def base_model(job: JobSpec, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model of a job's adapters, unpartitioned, in one process.

    Quantized weights are dequantized to `dtype`: adapters were trained on these values.

    Raises:
        SpecError: The model's files do not match its architecture.
    """
    config = load_config(job.model)
    _require_readable(job.model, config)
    quantization = _loading_quantization(job, config, dtype)
    if quantization is None:
        built = _built(job.model, config, dtype, job.run.seed, partitioned=False)
    else:
        random_source = _random_source(job.model, config, dtype, job.run.seed)
        built = _built_quantized(job.model, config, dtype, quantization, random_source)
    return dequantize(built) if getattr(built, "is_quantized", False) else built


def _without_memory(model: ModelSpec, config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built: PreTrainedModel = AutoModelForCausalLM.from_config(config, **_options(model, torch.bfloat16))
    return built


def _built(
    model: ModelSpec,
    config: PretrainedConfig,
    dtype: torch.dtype,
    seed: int,
    partitioned: bool,
    load: bool = True,
) -> PreTrainedModel:
    options = _options(model, dtype)
    if model.weights == "random" or not load:
        return _random(config, options, seed, partitioned)
    return _read(model, config, options)


def _read(model: ModelSpec, config: PretrainedConfig, options: dict[str, object]) -> PreTrainedModel:
    """Load a model's weights, then resize embedding and LM head to `vocab_size` of `config`.

    Raises:
        SpecError: Weights are missing or unexpected, or have a different shape.
    """
    from transformers import AutoModelForCausalLM

    stored = stored_config(model)
    built, info = load_with_info(
        AutoModelForCausalLM.from_pretrained,
        str(resolve(model.path)),
        config=stored,
        ignore_mismatched_sizes=True,  # reported below, together with missing and unexpected weights
        **options,
    )
    mismatch = WeightsMismatch.of(info)
    # For quantized checkpoints this is the only comparison: the header check lacks their tensor names.
    if quantization_method(stored) == "gptq":
        mismatch = without_empty_biases(mismatch, weight_files(model, stored, download=True) or ())
    if problem := first_problem_of_ranks(mismatch_problem(mismatch, type(built).__name__, stored)):
        raise _refusal(model, problem)
    if model.resize_embeddings:
        resize(built, config.get_text_config().vocab_size)
    return built


def _require_readable(model: ModelSpec, config: PretrainedConfig) -> None:
    """Check that the weight files match the architecture, before any tensor is loaded.

    Raises:
        SpecError: What is wrong with the files, and the remedy.
    """
    if model.weights == "random":
        return
    try:
        bare = _without_memory(model, config)
    except Exception:  # the caller builds the model with memory next; that either works or raises
        return
    _require_weights(model, bare, download=True)


def _require_weights(model: ModelSpec, bare: PreTrainedModel, download: bool) -> None:
    """Check that the weight files match the architecture; if one rank finds a problem, every rank raises.

    Args:
        model: The model section of the job.
        bare: The model on the meta device.
        download: Whether files of a hub model may be downloaded.

    Raises:
        SpecError: What is wrong with the files, and the remedy.
    """
    if model.weights == "random":
        return
    if problem := first_problem_of_ranks(weights_problem(model, bare, stored_config(model), download)):
        raise _refusal(model, problem)


def _loading_quantization(
    job: JobSpec, config: PretrainedConfig, dtype: torch.dtype
) -> QuantizationConfigMixin | None:
    """Return the quantization configuration for `from_pretrained`; None if weights are not quantized."""
    return (
        stored_quantization(config) if quantization_method(config) else quantization_config(job.method, dtype)
    )


def _random_source(
    model: ModelSpec, config: PretrainedConfig, dtype: torch.dtype, seed: int
) -> PreTrainedModel | None:
    """Return a random model whose weights are to be quantized; None if weights are loaded from files."""
    if model.weights == "pretrained":
        return None
    return _random(config, _options(model, dtype), seed, partitioned=False)


def _built_quantized(
    model: ModelSpec,
    config: PretrainedConfig,
    dtype: torch.dtype,
    quantization: QuantizationConfigMixin,
    random_source: PreTrainedModel | None,
) -> PreTrainedModel:
    options = {**_options(model, dtype), "quantization_config": quantization}
    if random_source is None:
        built = _read(model, config, options)
    else:
        del options["trust_remote_code"]  # accepted only by Auto classes; this is the model class itself
        load: Callable[..., PreTrainedModel] = type(random_source).from_pretrained
        built = load(None, config=config, state_dict=random_source.state_dict(), **options)
    if quantization_method(config) is None:
        disable_cpu_repacking(built)
    return built


def _options(model: ModelSpec, dtype: torch.dtype) -> dict[str, object]:
    attention.register()
    return {
        "dtype": dtype,
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention.IMPLEMENTATION,
    }


def _not_built(error: BaseException) -> str:
    # A KeyError of a model that looks the implementation up in its own table of attention classes.
    if error.args == (attention.IMPLEMENTATION,):
        return "has no attention that can be replaced, so packed documents would see each other"
    reason = " ".join(str(error).split())[:300]
    return f"cannot be built as a causal LM ({reason})"


def _refusal(model: ModelSpec, problem: str) -> SpecError:
    return SpecError(f"model.path={model.path} {problem}")


def build_model(
    job: JobSpec, dtype: torch.dtype, ds_config: DeepSpeedConfig, load_weights: bool = True
) -> PreTrainedModel | PeftModel:
    """Return the causal LM of a job, with adapters for method.type=lora, ready for `deepspeed.initialize`.

    Under ZeRO-3 transformers builds it inside `deepspeed.zero.Init`: each parameter is partitioned when it is
    created, and only rank 0 reads weights. torch.distributed must then be initialized, and every rank must
    make this call.

    Args:
        job: The model, method and parallel settings.
        dtype: dtype of the parameters.
        ds_config: The rendered DeepSpeed configuration; stage 3 partitions the model.
        load_weights: False if a checkpoint will overwrite all trained weights. The frozen base of adapters is
            loaded in any case.

    Raises:
        SpecError: The path is not a causal LM, its attention cannot separate packed documents, or it does not
            support the adapters, quantization or memory options of the job.
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    model, seed, is_lora = job.model, job.run.seed, job.method.type == "lora"
    config = load_config(model)
    if obstacle := config_unsupported_reason(config) or quantization_problem(config, job):
        raise _refusal(model, obstacle)
    reads = load_weights or is_lora
    if reads:
        _require_readable(model, config)
    quantization = _loading_quantization(job, config, dtype)
    random_source = None if quantization is None else _random_source(model, config, dtype, seed)
    # transformers and peft find this object through a weak reference: it must live until the model is built.
    partitioned = HfDeepSpeedConfig(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None
    try:
        if quantization is None:
            built = _built(model, config, dtype, seed, partitioned is not None, reads)
        else:
            built = _built_quantized(model, config, dtype, quantization, random_source)
    except _CANNOT_BUILD as error:
        raise _refusal(model, _not_built(error)) from None
    if obstacle := model_unsupported_reason(built):
        raise _refusal(model, obstacle)
    _save_memory(built, model, job.parallel.offload_activations == "cpu")
    adapted = adapt(built, job.method, dtype, seed) if is_lora else None
    if adapted is not None and job.method.adapter and load_weights:
        load_adapter(adapted, resolve(job.method.adapter))
    del partitioned, random_source
    trained = built if adapted is None else adapted
    trained.train()
    return trained


def _save_memory(built: nn.Module, model: ModelSpec, offload_activations: bool) -> None:
    checkpoint_layers(built, model.gradient_checkpointing, offload_activations)
    if model.mlp_tile_tokens:
        tile_mlps(built, model.mlp_tile_tokens)


def _random(
    config: PretrainedConfig, options: dict[str, object], seed: int, partitioned: bool
) -> PreTrainedModel:
    """Return a model with random weights; on CPU they do not depend on the ZeRO stage or number of workers.

    Under ZeRO-3 transformers initializes weights only after the whole model is built. Otherwise it also draws
    random numbers during construction, and the same seed would give different weights; so this skips the
    initialization during construction and runs it afterwards.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    torch.manual_seed(seed)
    built: PreTrainedModel
    if partitioned:
        built = AutoModelForCausalLM.from_config(config, **options)
        return built
    with no_init_weights():
        built = AutoModelForCausalLM.from_config(config, **options)
    built.initialize_weights()
    built.tie_weights()
    return built
