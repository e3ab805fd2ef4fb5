"""Architectures as data: what a causal language model of transformers consists of, keyed by ``model_type``.

A further architecture is one more entry of ``ARCHITECTURES``, one with a language model inside of ``MULTIMODAL``;
nothing else knows a module's name.
"""

from dataclasses import replace

from transformers import PreTrainedConfig

from requant.architecture import Architecture, Pair
from requant.errors import InputError
from requant.experts import ExpertNames

_ROUTER, _GATE = "router", "gate of linear attention"

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

# Values have a norm of their own, and are the keys in some blocks; a number scales what leaves a block. What feeds its
# smaller models beside (inputs of each layer, experts, keys of other blocks) has no entry, so that they are refused.
GEMMA4 = replace(
    GEMMA2,
    others=(*GEMMA2.others, ""),
    pairs=(Pair("pre_feedforward_layernorm", _GATE_UP, "norm"), _WITHIN_MLP),
    norm_offset=0.0,
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
    kept=(("block_sparse_moe.gate", _ROUTER),),
)

_SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")

QWEN_MOE = replace(
    LLAMA,
    linears=(*LLAMA.linears, *_SHARED, "mlp.shared_expert.down_proj"),
    fused=(*LLAMA.fused, _SHARED),
    pairs=(),
    outputs=(*LLAMA.outputs, "mlp.shared_expert.down_proj"),
    experts=ExpertNames(),
    kept=(("mlp.gate", _ROUTER), ("mlp.shared_expert_gate", _ROUTER)),
)

OLMOE = replace(MIXTRAL, others=QWEN3.others, experts=ExpertNames(), kept=(("mlp.gate", _ROUTER),))

_SHARED_EXPERTS = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")

GLM4_MOE = replace(
    OLMOE,
    linears=(*LLAMA.linears, *_SHARED_EXPERTS, "mlp.shared_experts.down_proj"),
    fused=(*LLAMA.fused, _SHARED_EXPERTS),
    outputs=(*LLAMA.outputs, "mlp.shared_experts.down_proj"),
)

EXAONE_MOE = replace(
    GLM4_MOE,
    others=(*GLM4_MOE.others, "mlp"),  # where its files have the bias that corrects the router's choice
    experts=ExpertNames(moved=(("gate.e_score_correction_bias", "e_score_correction_bias"),)),
)

ERNIE_MOE = replace(
    GLM4_MOE,
    others=(*_NORMS, "mlp.moe_statics"),
    experts=ExpertNames(moved=(("gate.moe_statics", "moe_statics"),)),
)

PHIMOE = replace(
    MIXTRAL,
    experts=ExpertNames("block_sparse_moe", "w1", "w3", "w2", moved=(("router", "gate"),)),
    quantizable_heads=(),
)

_SHARED_MLP = ("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj")

# Latent attention: keys and values, and mostly queries too, go through a narrow layer first.
DEEPSEEK = replace(
    GLM4_MOE,
    linears=(
        "self_attn.q_proj",
        "self_attn.q_a_proj",
        "self_attn.kv_a_proj_with_mqa",
        "self_attn.q_b_proj",
        "self_attn.o_proj",
        *(name for name in GLM4_MOE.linears if not name.startswith("self_attn.")),
    ),
    others=(*_NORMS, "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
    fused=(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), *GLM4_MOE.fused[1:]),
    kept=(*GLM4_MOE.kept, ("self_attn.kv_b_proj", "layer that vLLM takes apart")),
)

# Most blocks have linear attention (gated delta rule) instead of attention; a gate scales what leaves either.
QWEN3_5 = replace(
    QWEN3,
    linears=(
        *_QKV,
        "linear_attn.in_proj_qkv",
        "linear_attn.in_proj_z",
        "self_attn.o_proj",
        "linear_attn.out_proj",
        *_GATE_UP,
        "mlp.down_proj",
    ),
    others=(*QWEN3.others, "linear_attn", "linear_attn.conv1d", "linear_attn.norm"),
    fused=(*QWEN3.fused, ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")),
    pairs=(Pair("post_attention_layernorm", _GATE_UP, "norm"), _WITHIN_MLP),
    norm_offset=1.0,
    outputs=("self_attn.o_proj", "linear_attn.out_proj", "mlp.down_proj"),
    kept=(("linear_attn.in_proj_b", _GATE), ("linear_attn.in_proj_a", _GATE)),
)

QWEN3_5_MOE = replace(
    QWEN3_5,
    linears=(*QWEN3_5.linears, *_SHARED, "mlp.shared_expert.down_proj"),
    fused=(*QWEN3_5.fused, _SHARED),
    pairs=(),
    outputs=(*QWEN3_5.outputs, "mlp.shared_expert.down_proj"),
    experts=ExpertNames(),
    kept=(*QWEN3_5.kept, *QWEN_MOE.kept),
)

QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    linears=tuple(name.replace("_qkv", "_qkvz") for name in QWEN3_5_MOE.linears if name != "linear_attn.in_proj_z"),
    fused=(*QWEN3.fused, _SHARED),
    kept=(("linear_attn.in_proj_ba", _GATE), *QWEN_MOE.kept),
)

HUNYUAN_DENSE = replace(LLAMA, others=(*_NORMS, "self_attn.query_layernorm", "self_attn.key_layernorm"))

HUNYUAN_MOE = replace(
    OLMOE,
    linears=(*OLMOE.linears, *_SHARED_MLP, "mlp.shared_mlp.down_proj"),
    others=HUNYUAN_DENSE.others,
    fused=(*OLMOE.fused, _SHARED_MLP),
    outputs=(*OLMOE.outputs, "mlp.shared_mlp.down_proj"),
    kept=(("mlp.gate.wg", _ROUTER),),
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
    "qwen3_5_text": QWEN3_5,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "gemma4_text": GEMMA4,
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
    "hunyuan_v1_dense": HUNYUAN_DENSE,
    "glm": GLM4,
    "apertus": APERTUS,
    "opt": OPT,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN_MOE,
    "qwen3_moe": replace(QWEN_MOE, others=QWEN3.others),
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "olmoe": OLMOE,
    "glm4_moe": GLM4_MOE,
    "ernie4_5_moe": ERNIE_MOE,
    "phimoe": PHIMOE,
    "hunyuan_v1_moe": HUNYUAN_MOE,
    "exaone_moe": EXAONE_MOE,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "glm4_moe_lite": DEEPSEEK,
    "flex_olmo": replace(OLMOE, others=POST_NORM.others),
}


# Models that take images and the like as well: the architecture of their language model, which None says is that of
# its own ``model_type``, whichever it is. All else of them is stored as it is.
MULTIMODAL: dict[str, Architecture | None] = {
    "gemma3": GEMMA2,
    "gemma4": GEMMA4,
    "qwen2_vl": LLAMA,
    "qwen2_5_vl": LLAMA,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": replace(QWEN_MOE, others=QWEN3.others),
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
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
