"""Counting a model's parameters from its config.json alone, for whoever cannot build the model.

The counts are exact to the unit: matrices, biases, norms and what is tied, of the families in
`orchestrator.arch.families`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.arch.families import FAMILIES, Family, is_set, is_tied
from orchestrator.arch.model_dims import ModelDims
from orchestrator.config.schema import MethodSpec


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, weights that are tied counted once.

    Attributes:
        total: All of them.
        trained: Those that have a gradient.
        largest: Those of the largest weight.
    """

    total: int
    trained: int
    largest: int = 0


@dataclass(frozen=True)
class Linear:
    """A matrix of a layer.

    Attributes:
        name: Its module's name.
        inputs: Width of what enters.
        outputs: Width of what it gives.
        part: Where in the layer it is.
        bias: Whether it has one.
    """

    name: str
    inputs: int
    outputs: int
    part: Literal["attention", "mlp"]
    bias: bool = False


@dataclass(frozen=True)
class Parameters:
    """A model's parameters by place, weights that are tied counted once.

    Attributes:
        linears: The matrices of one layer.
        layers: Layers, all alike.
        norms_per_layer: Parameters of a layer's norms.
        embedding: Those of the embedding.
        head: Those of the LM head; 0 where it is the embedding.
        final_norms: Those of the norms before the first and after the last layer.
        head_bias: Bias of the LM head.
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
        """Weights of a layer's matrices: what is quantised."""
        return sum(each.inputs * each.outputs for each in self.linears)

    @property
    def biases_per_layer(self) -> int:
        """Biases of a layer's matrices."""
        return sum(each.outputs for each in self.linears if each.bias)

    @property
    def per_layer(self) -> int:
        """All of a layer: what ZeRO-3 gathers at once."""
        return self.matrices_per_layer + self.biases_per_layer + self.norms_per_layer

    @property
    def total(self) -> int:
        """All of the model."""
        return self.layers * self.per_layer + self.embedding + self.head + self.final_norms + self.head_bias

    @property
    def largest(self) -> int:
        """Those of the largest weight."""
        return max(self.embedding, *(each.inputs * each.outputs for each in self.linears))

    def adapters(self, rank: int, targets: Iterable[Linear], use_dora: bool = False) -> int:
        """Return the parameters of LoRA's matrices beside some linears, in all layers.

        Args:
            rank: Width of the two matrices.
            targets: The linears.
            use_dora: Whether each output has a length that is learned (DoRA).
        """
        return self.layers * sum(
            rank * (each.inputs + each.outputs) + (each.outputs if use_dora else 0) for each in targets
        )


def parameters(config: Mapping[str, Any]) -> Parameters | None:
    """Return the parameters of a model by place; None for a family whose layers are not known.

    Args:
        config: Its config.json.
    """
    shape = ModelDims.from_config(config)
    if shape is None:
        return None
    family = FAMILIES[str(config["model_type"])]
    embedding = shape.vocab_size * shape.hidden_size
    norm = family.norm_vectors * shape.hidden_size
    # GPT-NeoX and StableLM may run attention and MLP side by side; only the latter then has one norm.
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


def parameter_count(config: Mapping[str, Any], method: MethodSpec) -> ParameterCount | None:
    """Return how many parameters a model has, with its adapters.

    Args:
        config: Its config.json.
        method: Which of them are trained.

    Returns:
        The count; None for a family whose layers are not known.
    """
    found = parameters(config)
    if found is None:
        return None
    if method.type == "full":
        return ParameterCount(found.total, found.total, found.largest)
    chosen = target_linears(found.linears, method.target_modules)
    added = found.adapters(method.rank, chosen, method.use_dora)
    copies = found.embedding + found.head + found.head_bias if method.train_embeddings else 0
    return ParameterCount(found.total + added + copies, added + copies, found.largest)


def target_linears(linears: tuple[Linear, ...], targets: str | tuple[str, ...]) -> tuple[Linear, ...]:
    """Return the linears that adapters stand beside.

    Args:
        linears: Those of a layer.
        targets: `all-linear`, `attention`, or names of modules. A name that is not known may stand for any
            of them: rather too much memory is planned than too little.
    """
    if targets == "all-linear":
        return linears
    if targets == "attention":
        return tuple(each for each in linears if each.part == "attention")
    wanted = set(targets)
    if not wanted <= {each.name for each in linears}:
        return linears
    return tuple(each for each in linears if each.name in wanted)


def _linears(shape: ModelDims, family: Family, config: Mapping[str, Any]) -> tuple[Linear, ...]:
    h, i = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
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


def _qk_norms(shape: ModelDims, family: Family, config: Mapping[str, Any]) -> int:
    if family.qk_norm == "none" or not is_set(family.qk_norm_flag, config):
        return 0
    if family.qk_norm == "head":
        return 2 * family.norm_vectors * shape.head_dim
    return (shape.heads + shape.kv_heads) * shape.head_dim
