"""Count a model's parameters from its config.json, without building the model.

The counts are exact for the families in `orchestrator.arch.families`: weight matrices, biases, norms and tied
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.arch.families import FAMILIES, Family, is_set, is_tied
from orchestrator.arch.model_dims import ModelDims
from orchestrator.config.schema import MethodSpec


@dataclass(frozen=True)
class ParameterCount:
    """Parameter counts of a model; tied weights count once.

    Attributes:
        total: Number of all parameters.
        trained: Number of trainable parameters.
        largest: Elements of the largest weight tensor.
    """

    total: int
    trained: int
    largest: int = 0


@dataclass(frozen=True)
class Linear:
    """A linear module of a decoder layer, with a weight of shape [outputs, inputs].

    Attributes:
        name: Name of the module, such as `q_proj`.
        inputs: Input features.
        outputs: Output features.
        part: Whether it belongs to attention or MLP.
        bias: Whether it has a bias, of shape [outputs].
    """

    name: str
    inputs: int
    outputs: int
    part: Literal["attention", "mlp"]
    bias: bool = False


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model by component; tied weights count once.

    Attributes:
        linears: The linear modules of one decoder layer.
        layers: Number of decoder layers; all have the same shapes.
        norms_per_layer: Parameters of the norms of one layer.
        embedding: Parameters of the token embedding.
        head: Parameters of the LM head weight; 0 if tied to the embedding.
        final_norms: Parameters of the norms after the embedding and after the last layer.
        head_bias: Parameters of the LM head bias.
    """

    linears: tuple[Linear, ...]
    layers: int
    norms_per_layer: int
    embedding: int
    head: int
    final_norms: int
    head_bias: int = 0

    @property
    def matrices_per_layer(self) -> int:
        """Elements of the linear weights of one layer, which quantization applies to."""
        return sum(each.inputs * each.outputs for each in self.linears)

    @property
    def biases_per_layer(self) -> int:
        """Elements of the linear biases of one layer."""
        return sum(each.outputs for each in self.linears if each.bias)

    @property
    def per_layer(self) -> int:
        """Parameters of one layer, the unit that ZeRO-3 gathers at a time."""
        return self.matrices_per_layer + self.biases_per_layer + self.norms_per_layer

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.layers * self.per_layer + self.embedding + self.head + self.final_norms + self.head_bias

    @property
    def largest(self) -> int:
        """Elements of the largest weight tensor."""
        return max(self.embedding, *(each.inputs * each.outputs for each in self.linears))

    def adapters(self, rank: int, targets: Iterable[Linear], use_dora: bool = False) -> int:
        """Return the number of adapter parameters in all layers.

        Args:
            rank: LoRA rank: A has shape [rank, inputs], B has shape [outputs, rank].
            targets: The linear modules of one layer that get adapters.
            use_dora: Whether to add DoRA's magnitude vector, shape [outputs].
        """
        return self.layers * sum(
            rank * (each.inputs + each.outputs) + (each.outputs if use_dora else 0) for each in targets
        )


def parameters(config: Mapping[str, object]) -> Parameters | None:
    """Return the parameter counts of a model by component; None for an unknown family.

    Args:
        config: The model's config.json.
    """
    shape = ModelDims.from_config(config)
    if shape is None:
        return None
    family = FAMILIES[str(config["model_type"])]
    embedding = shape.vocab_size * shape.hidden_size
    norm = family.norm_vectors * shape.hidden_size
    # GPT-NeoX and StableLM can compute attention and MLP in parallel; only StableLM then has a single norm.
    norms = 1 if config["model_type"] == "stablelm" and config.get("use_parallel_residual") else family.norms
    return Parameters(
        linears=_linears(shape, family, config),
        layers=shape.layers,
        norms_per_layer=norms * norm + _qk_norms(shape, family, config),
        embedding=embedding,
        head=0 if is_tied(config) else embedding,
        final_norms=norm * (2 if family.embedding_norm else 1),
        head_bias=shape.vocab_size if is_set(family.head_bias, config) else 0,
    )


def parameter_count(config: Mapping[str, object], method: MethodSpec) -> ParameterCount | None:
    """Return the parameter counts of a model including its adapters.

    Args:
        config: The model's config.json.
        method: Full training, or LoRA with its rank and target modules.

    Returns:
        The counts; None for an unknown family.
    """
    found = parameters(config)
    if found is None:
        return None
    if method.type == "full":
        return ParameterCount(found.total, found.total, found.largest)
    chosen = target_linears(found.linears, method.target_modules)
    added = found.adapters(method.rank, chosen, method.use_dora)
    # peft's modules_to_save adds trainable copies of embedding and head; the frozen originals remain.
    copies = found.embedding + found.head + found.head_bias if method.train_embeddings else 0
    return ParameterCount(found.total + added + copies, added + copies, found.largest)


def target_linears(linears: tuple[Linear, ...], targets: str | tuple[str, ...]) -> tuple[Linear, ...]:
    """Return the linear modules that get adapters.

    Args:
        linears: The linear modules of one layer.
        targets: `all-linear`, `attention`, or module names. If a name is unknown, all linear modules are
            returned, so that memory is overestimated rather than underestimated.
    """
    if targets == "all-linear":
        return linears
    if targets == "attention":
        return tuple(each for each in linears if each.part == "attention")
    wanted = set(targets)
    if not wanted <= {each.name for each in linears}:
        return linears
    return tuple(each for each in linears if each.name in wanted)


def _linears(shape: ModelDims, family: Family, config: Mapping[str, object]) -> tuple[Linear, ...]:
    h, i = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Separate q, k and v modules, or one fused module; likewise gate and up may be fused into one.
    widths = (queries, keys, keys) if len(family.qkv) == 3 else (queries + 2 * keys,)
    qkv_bias, mlp_bias = is_set(family.qkv_bias, config), is_set(family.mlp_bias, config)
    inner = (2 if family.gated else 1) * i // len(family.mlp_in)
    return (
        *(
            Linear(name, h, width, "attention", qkv_bias)
            for name, width in zip(family.qkv, widths, strict=True)
        ),
        Linear(family.attention_out, queries, h, "attention", is_set(family.out_bias, config)),
        *(Linear(name, h, inner, "mlp", mlp_bias) for name in family.mlp_in),
        Linear(family.mlp_out, i, h, "mlp", mlp_bias),
    )


def _qk_norms(shape: ModelDims, family: Family, config: Mapping[str, object]) -> int:
    if family.qk_norm == "none" or not is_set(family.qk_norm_flag, config):
        return 0
    if family.qk_norm == "head":  # one vector [head_dim] for queries and one for keys, shared by all heads
        return 2 * family.norm_vectors * shape.head_dim
    return (shape.heads + shape.kv_heads) * shape.head_dim
