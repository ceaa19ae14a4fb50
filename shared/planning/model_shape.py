"""A decoder's shape, from its config or its size, and how its modules are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from shared.errors import PlanError
from shared.planning.profiles import family_of

# Public Llama, Qwen and SmolLM decoders: parameters, hidden, layers, intermediate, heads, kv_heads, head_dim,
# vocab, tied.
_TYPICAL = (
    (0.135e9, 576, 30, 1536, 9, 3, 64, 49152, True),
    (0.36e9, 960, 32, 2560, 15, 5, 64, 49152, True),
    (0.5e9, 896, 24, 4864, 14, 2, 64, 151936, True),
    (1.24e9, 2048, 16, 8192, 32, 8, 64, 128256, True),
    (1.54e9, 1536, 28, 8960, 12, 2, 128, 151936, True),
    (3.2e9, 3072, 28, 8192, 24, 8, 128, 128256, True),
    (8.0e9, 4096, 32, 14336, 32, 8, 128, 128256, False),
    (14.8e9, 5120, 48, 13824, 40, 8, 128, 152064, False),
    (32.8e9, 5120, 64, 27648, 40, 8, 128, 152064, False),
    (70.6e9, 8192, 80, 28672, 64, 8, 128, 128256, False),
)


class Linear(Struct, frozen=True):
    """One kind of linear module: `count` of them, each in_features x out_features."""

    name: str
    in_features: int
    out_features: int
    count: int


class ModulePlan(Struct, frozen=True, kw_only=True):
    """How one kind of linear module is trained. `name` is the last part of its path, such as `q_proj`."""

    name: str
    in_features: int
    out_features: int
    count: int  # how many of them the model has
    method: str  # "lora" or "dense"
    rank: int = 0  # lora only
    alpha: float = 0.0  # lora only
    parameters: int = 0  # trainable weights of all `count` together


class Extras(Struct, frozen=True, kw_only=True):
    """What is trained whole besides the linear modules of the layers."""

    norms: bool = False
    embeddings: bool = False  # and the output matrix
    parameters: int = 0  # weights of all these


class ModelShape(Struct, frozen=True, kw_only=True):
    """The sizes of a decoder that memory and speed depend on; a Llama's where nothing else is known."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the output matrix is the embedding matrix
    head_norms: bool = False  # queries and keys are normed, as in Qwen3
    layer_norms: int = 2  # of a layer, over the hidden size; four in Gemma 2 and 3
    max_positions: int = 8192
    family: str = "other"  # "llama", "qwen" or "other": decides the learning rate
    own_linears: tuple[Linear, ...] = ()  # the kinds that are trained, where the model itself was looked at
    own_parameters: int = 0  # all weights, likewise
    own_norm_parameters: int = 0  # weights of all norms, likewise
    idle_parameters: int = 0  # weights of experts that a token doesn't meet
    whole: bool = False  # each device holds all of it, if one has room for that: see `architectures`

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Return the kinds of linear modules of the decoder layers: the model's own, or a Llama's seven."""
        if self.own_linears:
            return self.own_linears
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            Linear("q_proj", self.hidden, query, self.layers),
            Linear("k_proj", self.hidden, key, self.layers),
            Linear("v_proj", self.hidden, key, self.layers),
            Linear("o_proj", query, self.hidden, self.layers),
            Linear("gate_proj", self.hidden, self.intermediate, self.layers),
            Linear("up_proj", self.hidden, self.intermediate, self.layers),
            Linear("down_proj", self.intermediate, self.hidden, self.layers),
        )

    @property
    def linear_parameters(self) -> int:
        """Weights of all layers, without embeddings and head."""
        if self.own_parameters:
            return max(1, self.own_parameters - self.embedding_parameters)
        return sum(linear.in_features * linear.out_features * linear.count for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the output matrix if it is one of its own."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def norm_parameters(self) -> int:
        """Weights of all norms."""
        if self.own_norm_parameters:
            return self.own_norm_parameters
        heads = 2 * self.head_dim * self.layers if self.head_norms else 0
        return (self.layer_norms * self.layers + 1) * self.hidden + heads

    @property
    def parameters(self) -> int:
        """Return the number of weights (from a config alone, without the few biases of some families)."""
        if self.own_parameters:
            return self.own_parameters
        return self.linear_parameters + self.embedding_parameters + self.norm_parameters


# What other architectures' configs call it.
_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "num_heads", "n_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_k", "moe_topk"),
}


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape that a decoder's Hugging Face `config.json` describes, about as a Llama's.

    Of a wrapper the text model counts. Raises PlanError naming the field if one is missing or unusable.
    """
    config = _text(config)
    heads = _positive(config, "num_attention_heads")
    hidden = _positive(config, "hidden_size")
    shape = ModelShape(
        hidden=hidden,
        layers=_positive(config, "num_hidden_layers"),
        intermediate=_positive(config, "intermediate_size", 4 * hidden),
        heads=heads,
        kv_heads=_positive(config, "num_key_value_heads", heads),
        head_dim=_positive(config, "head_dim", max(1, hidden // heads)),
        vocab=_positive(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_positive(config, "max_position_embeddings", 4096),
        family=family_of(str(config.get("model_type", ""))),
    )
    experts = experts_of(config)
    return _with_experts(shape, config, experts) if experts > 1 else shape


def experts_of(config: Mapping[str, Any]) -> int:
    """Return how many experts the layers have at most, by a model's `config.json`; 1 without any."""
    found = _first(_text(config), "num_experts")
    counts = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)]
    return max([1, *counts])


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    if isinstance(text, Mapping) and "hidden_size" not in config:
        return {"tie_word_embeddings": config.get("tie_word_embeddings"), **text}
    return config


def _with_experts(shape: ModelShape, config: Mapping[str, Any], experts: int) -> ModelShape:
    """Return a mixture's shape: what is trained is its attention, and each layer holds all experts."""
    width = _positive(config, "moe_intermediate_size", shape.intermediate)
    used = min(experts, _positive(config, "num_experts_per_tok", experts))
    expert = 3 * shape.hidden * width * shape.layers
    dense = 3 * shape.hidden * shape.intermediate * shape.layers
    return replace(
        shape,
        intermediate=max(width * used, 1),
        own_linears=shape.linears[:4],
        own_parameters=shape.parameters - dense + experts * expert,
        idle_parameters=(experts - used) * expert,
        whole=True,
    )


def extras_of(shape: ModelShape, *, norms: bool, embeddings: bool) -> Extras:
    """Return what is trained besides the linear modules, with the number of its weights."""
    parameters = norms * shape.norm_parameters + embeddings * shape.embedding_parameters
    return Extras(norms=norms, embeddings=embeddings, parameters=parameters)


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    found = _first(config, key)
    value = default if found is None else found
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"the model's config needs a positive whole number {key!r}, it has {value!r}")
    return value


def _first(config: Mapping[str, Any], key: str) -> Any:
    known = (config.get(name) for name in (key, *_NAMES.get(key, ())))
    return next((value for value in known if value is not None), None)


def shape_from_params(parameters: int, family: str = "other") -> ModelShape:
    """Return a typical shape of that size: the nearest public decoder, with more or fewer layers."""
    if parameters < 1:
        raise PlanError(f"a model needs a positive number of parameters, got {parameters}")
    nearest = min(_TYPICAL, key=lambda row: abs(math.log(row[0] / parameters)))
    _, hidden, layers, intermediate, heads, kv_heads, head_dim, vocab, tied = nearest
    shape = ModelShape(
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        tied=tied,
        max_positions=32768,
        family=family,
    )
    per_layer = shape.linear_parameters / layers
    wanted = max(1, round((parameters - shape.embedding_parameters) / per_layer))
    return replace(shape, layers=wanted)
