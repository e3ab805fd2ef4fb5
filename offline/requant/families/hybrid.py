"""Models whose blocks, most of them, have something else in the place of attention or beside it."""

from dataclasses import replace

from requant.architecture import Pair
from requant.experts import ExpertNames
from requant.families.dense import GATE_UP, LLAMA, NORMS, QKV, QWEN3, WITHIN_ATTENTION, WITHIN_MLP
from requant.families.experts import QWEN_MOE, ROUTER, with_shared

_GATE = "gate of linear attention"

# Most blocks have linear attention (gated delta rule) instead of attention; a gate scales what leaves either.
QWEN3_5 = replace(
    QWEN3,
    linears=(
        *QKV,
        "linear_attn.in_proj_qkv",
        "linear_attn.in_proj_z",
        "self_attn.o_proj",
        "linear_attn.out_proj",
        *GATE_UP,
        "mlp.down_proj",
    ),
    others=(*QWEN3.others, "linear_attn", "linear_attn.conv1d", "linear_attn.norm"),
    fused=(*QWEN3.fused, ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")),
    pairs=(Pair("post_attention_layernorm", GATE_UP, "norm"), WITHIN_MLP),
    norm_offset=1.0,
    outputs=("self_attn.o_proj", "linear_attn.out_proj", "mlp.down_proj"),
    kept=(("linear_attn.in_proj_b", _GATE), ("linear_attn.in_proj_a", _GATE)),
)

QWEN3_5_MOE = with_shared(
    QWEN3_5, "mlp.shared_expert", pairs=(), experts=ExpertNames(), kept=(*QWEN3_5.kept, *QWEN_MOE.kept)
)

QWEN3_NEXT = replace(
    QWEN3_5_MOE,
    linears=tuple(name.replace("_qkv", "_qkvz") for name in QWEN3_5_MOE.linears if name != "linear_attn.in_proj_z"),
    fused=QWEN_MOE.fused,
    kept=(("linear_attn.in_proj_ba", _GATE), *QWEN_MOE.kept),
)

_W1_W3 = ("feed_forward.w1", "feed_forward.w3")

# Most blocks have a short convolution between two linear layers instead of attention, which gates scale.
LFM2 = replace(
    LLAMA,
    linears=(
        *QKV,
        "conv.in_proj",
        "self_attn.out_proj",
        "conv.out_proj",
        *_W1_W3,
        "feed_forward.w2",
    ),
    others=("operator_norm", "ffn_norm", "self_attn.q_layernorm", "self_attn.k_layernorm", "conv.conv"),
    fused=(QKV, _W1_W3),
    pairs=(
        Pair("ffn_norm", _W1_W3, "norm"),
        Pair("feed_forward.w3", ("feed_forward.w2",), "rows"),
    ),
    outputs=("self_attn.out_proj", "conv.out_proj", "feed_forward.w2"),
)

LFM2_MOE = replace(
    LFM2,
    pairs=(),
    experts=ExpertNames("feed_forward", "w1", "w3", "w2"),
    others=(*LFM2.others, "feed_forward"),  # the bias that corrects the router's choice
    kept=(("feed_forward.gate", ROUTER),),
)

# State space models, in the place of attention in most blocks, or beside it.
_MAMBA = ("mamba", "mamba.conv1d", "mamba.norm")

# Without routed experts, which the files hold as one tensor.
GRANITE_HYBRID = replace(
    LLAMA,
    linears=(
        *QKV,
        "mamba.in_proj",
        "self_attn.o_proj",
        "mamba.out_proj",
        "shared_mlp.input_linear",
        "shared_mlp.output_linear",
    ),
    others=(*NORMS, *_MAMBA),
    fused=(QKV,),
    pairs=(Pair("post_attention_layernorm", ("shared_mlp.input_linear",), "norm"),),
    outputs=("self_attn.o_proj", "mamba.out_proj", "shared_mlp.output_linear"),
)

_FORWARD = ("feed_forward.gate_proj", "feed_forward.up_proj")

FALCON_H1 = replace(
    LLAMA,
    linears=(*QKV, "mamba.in_proj", "self_attn.o_proj", "mamba.out_proj", *_FORWARD, "feed_forward.down_proj"),
    others=("input_layernorm", "pre_ff_layernorm", *_MAMBA),
    fused=(QKV, _FORWARD),
    pairs=(
        Pair("input_layernorm", (*QKV, "mamba.in_proj"), "norm"),
        WITHIN_ATTENTION,
        Pair("pre_ff_layernorm", _FORWARD, "norm"),
        Pair("feed_forward.up_proj", ("feed_forward.down_proj",), "rows"),
    ),
    outputs=("self_attn.o_proj", "mamba.out_proj", "feed_forward.down_proj"),
)
