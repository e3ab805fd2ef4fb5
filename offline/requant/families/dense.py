"""Blocks of attention and one MLP."""

from dataclasses import replace

from requant.architecture import Architecture, Pair

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

_INTO_ATTENTION = Pair("input_layernorm", QKV, "norm")
WITHIN_ATTENTION = Pair("self_attn.v_proj", ("self_attn.o_proj",), "heads")
WITHIN_MLP = Pair("mlp.up_proj", ("mlp.down_proj",), "rows")

LLAMA = Architecture(
    blocks="model.layers",
    linears=(*QKV, "self_attn.o_proj", *GATE_UP, "mlp.down_proj"),
    others=NORMS,
    fused=(QKV, GATE_UP),
    pairs=(_INTO_ATTENTION, WITHIN_ATTENTION, Pair("post_attention_layernorm", GATE_UP, "norm"), WITHIN_MLP),
)

QWEN3 = replace(LLAMA, others=(*NORMS, *_QK_NORMS))

GEMMA = replace(LLAMA, norm_offset=1.0, quantizable_heads=("untied",))

# A norm before and one after attention and MLP each; those after scale what leaves a linear layer.
GEMMA2 = replace(
    GEMMA,
    others=(*NORMS, *_QK_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    pairs=(_INTO_ATTENTION, WITHIN_ATTENTION, Pair("pre_feedforward_layernorm", GATE_UP, "norm"), WITHIN_MLP),
)

# Values have a norm of their own, and are the keys in some blocks; a number scales what leaves a block. What feeds its
# smaller models beside (inputs of each layer, experts, keys of other blocks) has no entry, so that they are refused.
GEMMA4 = replace(
    GEMMA2,
    others=(*GEMMA2.others, ""),
    pairs=(Pair("pre_feedforward_layernorm", GATE_UP, "norm"), WITHIN_MLP),
    norm_offset=0.0,
)

# Norms after attention and MLP only: nothing can be folded into what feeds either.
POST_NORM = replace(
    LLAMA,
    others=("post_attention_layernorm", "post_feedforward_layernorm", *_QK_NORMS),
    pairs=(WITHIN_ATTENTION, WITHIN_MLP),
)

# Attention and MLP side by side, behind one norm. vLLM's head is the embeddings themselves.
COHERE = replace(
    LLAMA,
    others=("input_layernorm", *_QK_NORMS),
    pairs=(Pair("input_layernorm", (*QKV, *GATE_UP), "norm"), WITHIN_ATTENTION, WITHIN_MLP),
    quantizable_heads=(),
)

_ONE_AFTER_THE_OTHER = (("use_parallel_residual", False),)

STABLELM = replace(
    LLAMA,
    pairs=(
        replace(_INTO_ATTENTION, requires=_ONE_AFTER_THE_OTHER),
        WITHIN_ATTENTION,
        Pair("post_attention_layernorm", GATE_UP, "norm", _ONE_AFTER_THE_OTHER),
        WITHIN_MLP,
    ),
)

# What lies between the MLP's layers is no factor of a gate, but the square of a ReLU or the like.
UNGATED = replace(
    LLAMA,
    linears=(*QKV, "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    fused=(QKV,),
    pairs=(_INTO_ATTENTION, WITHIN_ATTENTION, Pair("post_attention_layernorm", ("mlp.up_proj",), "norm")),
)

NEMOTRON = replace(UNGATED, norm_offset=1.0, quantizable_heads=("untied",))

APERTUS = replace(
    UNGATED,
    others=("attention_layernorm", "feedforward_layernorm", *_QK_NORMS, "mlp.act_fn"),
    pairs=(
        Pair("attention_layernorm", QKV, "norm"),
        WITHIN_ATTENTION,
        Pair("feedforward_layernorm", ("mlp.up_proj",), "norm"),
    ),
)

STARCODER2 = replace(
    LLAMA,
    linears=(*QKV, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"),
    fused=(QKV,),
    pairs=(_INTO_ATTENTION, WITHIN_ATTENTION, Pair("post_attention_layernorm", ("mlp.c_fc",), "norm")),
    outputs=("self_attn.o_proj", "mlp.c_proj"),
    quantizable_heads=(),
)

PHI = replace(
    LLAMA,
    linears=(*QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    others=("input_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm"),
    fused=(QKV,),
    pairs=(
        Pair("input_layernorm", (*QKV, "mlp.fc1"), "norm"),
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
    linears=(*QKV, "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    others=(*NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
    fused=(QKV,),
    pairs=(_INTO_ATTENTION, WITHIN_ATTENTION, Pair("post_attention_layernorm", ("mlp.gate_up_proj",), "norm")),
)

_PRE_NORM = (("do_layer_norm_before", True),)

OPT = Architecture(
    blocks="model.decoder.layers",
    linears=(*QKV, "self_attn.out_proj", "fc1", "fc2"),
    others=("self_attn_layer_norm", "final_layer_norm"),
    fused=(QKV,),
    pairs=(
        Pair("self_attn_layer_norm", QKV, "norm", _PRE_NORM),
        Pair("self_attn.v_proj", ("self_attn.out_proj",), "heads"),
        Pair("final_layer_norm", ("fc1",), "norm", _PRE_NORM),
        Pair("fc1", ("fc2",), "rows", (("activation_function", "relu"),)),
    ),
    outputs=("self_attn.out_proj", "fc2"),
    embeddings="model.decoder.embed_tokens",
    quantizable_heads=(),
)

HUNYUAN_DENSE = replace(LLAMA, others=(*NORMS, "self_attn.query_layernorm", "self_attn.key_layernorm"))
