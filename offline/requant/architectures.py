"""Architectures as data: what a causal language model of transformers consists of, keyed by ``model_type``.

A further architecture is one more entry of ``ARCHITECTURES``, one with a language model inside of ``MULTIMODAL``;
nothing else knows a module's name.
"""

from dataclasses import dataclass, replace
from typing import Literal

from requant_kernels.scheme import OUTPUT_HEAD
from torch import nn
from transformers import PreTrainedConfig

from requant.errors import InputError
from requant.experts import ExpertNames


@dataclass(frozen=True)
class Pair:
    """A producer whose output channels can be divided by scales that its consumers' columns are multiplied by, exactly.

    through: what lies between. "norm": the producer is a norm, nothing does. "rows": each output row of a linear layer
    meets one column, perhaps multiplied by something else or through a ReLU. "heads": attention, so that the value row
    of a key/value head meets one column for each query head. requires: what config.json must say for it to be exact.
    """

    producer: str
    consumers: tuple[str, ...]
    through: Literal["norm", "rows", "heads"]
    requires: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Where things are. Names inside a block are relative to it, the others are full. ``linears`` starts with what
    makes queries and ends with the MLP's last. ``others``: what else may hold parameters in a block, norms mostly.
    ``pairs``: in the order in which a block runs them. ``norm_offset``: a norm multiplies by weight + norm_offset.
    ``outputs``: the linear layers whose columns tensor parallelism splits. ``experts``: of a mixture-of-experts model,
    whose blocks have some of ``linears`` and ``routers`` each; ``routers``: what decides between experts, and stays as
    it is."""

    blocks: str
    linears: tuple[str, ...]
    others: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...]  # linears that vLLM runs as one, so that they must share a scheme
    pairs: tuple[Pair, ...] = ()
    norm_offset: float = 0.0
    outputs: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    embeddings: str = "model.embed_tokens"
    head: str = OUTPUT_HEAD
    # vLLM hands a quantization to the output heads of these: a tied one needs it for the embeddings as well
    quantizable_heads: tuple[Literal["tied", "untied"], ...] = ("tied", "untied")

    experts: ExpertNames | None = None
    routers: tuple[str, ...] = ()

    @property
    def row_parallel(self) -> tuple[str, ...]:
        """How the names of layers end whose columns tensor parallelism splits."""
        return (*self.outputs, *((self.experts.down,) if self.experts else ()))

    def of(self, block: nn.Module) -> "Architecture":
        """What ``block`` has of it, its experts spelled out."""
        if self.experts is None:
            return self
        present, experts = {name for name, _ in block.named_modules()}, list(self.experts.of(block))
        return replace(
            self,
            linears=(*filter(present.__contains__, self.linears), *(name for expert in experts for name in expert)),
            fused=(*filter(present.issuperset, self.fused), *((gate, up) for gate, up, _ in experts)),
            routers=tuple(filter(present.__contains__, self.routers)),
        )

    @property
    def stages(self) -> list[tuple[str, ...]]:
        """The linear layers in the order in which a block runs them; those that are fed one tensor together."""
        together = {member: members for members in self.fused for member in members}
        return list(dict.fromkeys(together.get(name, (name,)) for name in self.linears))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_INTO_ATTENTION = Pair("input_layernorm", _QKV, "norm")
_WITHIN_ATTENTION = Pair("self_attn.v_proj", ("self_attn.o_proj",), "heads")
_WITHIN_MLP = Pair("mlp.up_proj", ("mlp.down_proj",), "rows")

LLAMA = Architecture(
    blocks="model.layers",
    linears=(*_QKV, "self_attn.o_proj", *_GATE_UP, "mlp.down_proj"),
    others=_NORMS,
    fused=(_QKV, _GATE_UP),
    pairs=(_INTO_ATTENTION, _WITHIN_ATTENTION, Pair("post_attention_layernorm", _GATE_UP, "norm"), _WITHIN_MLP),
)

QWEN3 = replace(LLAMA, others=(*_NORMS, *_QK_NORMS))

GEMMA = replace(LLAMA, norm_offset=1.0, quantizable_heads=("untied",))

# A norm before and one after attention and MLP each; those after scale what leaves a linear layer.
GEMMA2 = replace(
    GEMMA,
    others=(*_NORMS, *_QK_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    pairs=(_INTO_ATTENTION, _WITHIN_ATTENTION, Pair("pre_feedforward_layernorm", _GATE_UP, "norm"), _WITHIN_MLP),
)

# Norms after attention and MLP only: nothing can be folded into what feeds either.
POST_NORM = replace(
    LLAMA,
    others=("post_attention_layernorm", "post_feedforward_layernorm", *_QK_NORMS),
    pairs=(_WITHIN_ATTENTION, _WITHIN_MLP),
)

# Attention and MLP side by side, behind one norm. vLLM's head is the embeddings themselves.
COHERE = replace(
    LLAMA,
    others=("input_layernorm", *_QK_NORMS),
    pairs=(Pair("input_layernorm", (*_QKV, *_GATE_UP), "norm"), _WITHIN_ATTENTION, _WITHIN_MLP),
    quantizable_heads=(),
)

_ONE_AFTER_THE_OTHER = (("use_parallel_residual", False),)

STABLELM = replace(
    LLAMA,
    pairs=(
        replace(_INTO_ATTENTION, requires=_ONE_AFTER_THE_OTHER),
        _WITHIN_ATTENTION,
        Pair("post_attention_layernorm", _GATE_UP, "norm", _ONE_AFTER_THE_OTHER),
        _WITHIN_MLP,
    ),
)

# What lies between the MLP's layers is no factor of a gate, but the square of a ReLU or the like.
_UNGATED = replace(
    LLAMA,
    linears=(*_QKV, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    fused=(_QKV,),
    pairs=(_INTO_ATTENTION, _WITHIN_ATTENTION, Pair("post_attention_layernorm", ("mlp.up_proj",), "norm")),
)

NEMOTRON = replace(_UNGATED, norm_offset=1.0, quantizable_heads=("untied",))

APERTUS = replace(
    _UNGATED,
    others=("attention_layernorm", "feedforward_layernorm", *_QK_NORMS, "mlp.act_fn"),
    pairs=(
        Pair("attention_layernorm", _QKV, "norm"),
        _WITHIN_ATTENTION,
        Pair("feedforward_layernorm", ("mlp.up_proj",), "norm"),
    ),
)

STARCODER2 = replace(
    LLAMA,
    linears=(*_QKV, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"),
    fused=(_QKV,),
    pairs=(_INTO_ATTENTION, _WITHIN_ATTENTION, Pair("post_attention_layernorm", ("mlp.c_fc",), "norm")),
    outputs=("self_attn.o_proj", "mlp.c_proj"),
    quantizable_heads=(),
)

PHI = replace(
    LLAMA,
    linears=(*_QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    others=("input_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm"),
    fused=(_QKV,),
    pairs=(
        Pair("input_layernorm", (*_QKV, "mlp.fc1"), "norm"),
        Pair("self_attn.v_proj", ("self_attn.dense",), "heads"),
    ),
    outputs=("self_attn.dense", "mlp.fc2"),
    quantizable_heads=(),
)

# What is fused in vLLM is so in the file already, and stays one layer.
PHI3 = replace(
    LLAMA,
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    fused=(),
    pairs=(
        Pair("input_layernorm", ("self_attn.qkv_proj",), "norm"),
        Pair("post_attention_layernorm", ("mlp.gate_up_proj",), "norm"),
    ),
)

GLM4 = replace(
    LLAMA,
    linears=(*_QKV, "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    others=(*_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
    fused=(_QKV,),
    pairs=(_INTO_ATTENTION, _WITHIN_ATTENTION, Pair("post_attention_layernorm", ("mlp.gate_up_proj",), "norm")),
)

_PRE_NORM = (("do_layer_norm_before", True),)

OPT = Architecture(
    blocks="model.decoder.layers",
    linears=(*_QKV, "self_attn.out_proj", "fc1", "fc2"),
    others=("self_attn_layer_norm", "final_layer_norm"),
    fused=(_QKV,),
    pairs=(
        Pair("self_attn_layer_norm", _QKV, "norm", _PRE_NORM),
        Pair("self_attn.v_proj", ("self_attn.out_proj",), "heads"),
        Pair("final_layer_norm", ("fc1",), "norm", _PRE_NORM),
        Pair("fc1", ("fc2",), "rows", (("activation_function", "relu"),)),
    ),
    outputs=("self_attn.out_proj", "fc2"),
    embeddings="model.decoder.embed_tokens",
    quantizable_heads=(),
)

MIXTRAL = replace(
    LLAMA,
    linears=(*_QKV, "self_attn.o_proj"),
    fused=(_QKV,),
    pairs=(),
    outputs=("self_attn.o_proj",),
    experts=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    routers=("block_sparse_moe.gate",),
)

_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")

QWEN_MOE = replace(
    LLAMA,
    linears=(*LLAMA.linears, *_SHARED, "mlp.shared_expert.down_proj"),
    fused=(*LLAMA.fused, _SHARED),
    pairs=(),
    outputs=(*LLAMA.outputs, "mlp.shared_expert.down_proj"),
    experts=ExpertNames(),
    routers=("mlp.gate", "mlp.shared_expert_gate"),
)

OLMOE = replace(MIXTRAL, others=QWEN3.others, experts=ExpertNames(), routers=("mlp.gate",))

_SHARED_EXPERTS = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")

GLM4_MOE = replace(
    OLMOE,
    linears=(*LLAMA.linears, *_SHARED_EXPERTS, "mlp.shared_experts.down_proj"),
    fused=(*LLAMA.fused, _SHARED_EXPERTS),
    outputs=(*LLAMA.outputs, "mlp.shared_experts.down_proj"),
)

ARCHITECTURES = {
    "llama": LLAMA,  # SmolLM and SmolLM2 too
    "mistral": LLAMA,
    "ministral3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "ernie4_5": LLAMA,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "phi3": PHI3,
    "glm4": GLM4,
    "exaone4": POST_NORM,
    "cohere": COHERE,
    "cohere2": COHERE,
    "stablelm": STABLELM,
    "nemotron": NEMOTRON,
    "olmo2": POST_NORM,
    "olmo3": POST_NORM,
    "starcoder2": STARCODER2,
    "phi": PHI,
    "seed_oss": LLAMA,
    "hunyuan_v1_dense": replace(LLAMA, others=(*_NORMS, "self_attn.query_layernorm", "self_attn.key_layernorm")),
    "glm": GLM4,
    "apertus": APERTUS,
    "opt": OPT,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN_MOE,
    "qwen3_moe": replace(QWEN_MOE, others=QWEN3.others),
    "olmoe": OLMOE,
    "glm4_moe": GLM4_MOE,
}


# Models that take images and the like as well: the architecture of their language model, which None says is that of
# its own ``model_type``, whichever it is. All else of them is stored as it is.
MULTIMODAL: dict[str, Architecture | None] = {
    "gemma3": GEMMA2,
    "qwen2_vl": LLAMA,
    "qwen2_5_vl": LLAMA,
    "qwen3_vl": QWEN3,
    "mistral3": None,
    "llava": None,
    "internvl": None,
}
LANGUAGE_MODEL = "model.language_model"  # where transformers has it in all of these


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Of a model of a known ``model_type``. Raises InputError where its language model is none that is supported."""
    kind = config.model_type
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    text = config.get_text_config().model_type
    found = MULTIMODAL[kind] or ARCHITECTURES.get(text)
    if found is None:
        raise InputError(f"architecture {kind!r} is not supported with a language model {text!r}")
    blocks, embeddings = (f"{LANGUAGE_MODEL}{name.removeprefix('model')}" for name in (found.blocks, found.embeddings))
    return replace(found, blocks=blocks, embeddings=embeddings)


def refuse_unknown(model_type: str, where: str) -> None:
    """Raises InputError naming the supported ones."""
    known = (*ARCHITECTURES, *MULTIMODAL)
    if model_type not in known:
        raise InputError(f"{where}: architecture {model_type!r} is not supported (supported: {', '.join(known)})")
