"""Blocks of attention and routed experts, or an MLP where a model begins with some that are dense."""

from dataclasses import replace

from requant.experts import ExpertNames
from requant.families.dense import HUNYUAN_DENSE, LLAMA, NORMS, QKV, QWEN3

ROUTER = "router"

MIXTRAL = replace(
    LLAMA,
    linears=(*QKV, "self_attn.o_proj"),
    fused=(QKV,),
    pairs=(),
    outputs=("self_attn.o_proj",),
    experts=ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    kept=(("block_sparse_moe.gate", ROUTER),),
)

SHARED_EXPERT = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")

QWEN_MOE = replace(
    LLAMA,
    linears=(*LLAMA.linears, *SHARED_EXPERT, "mlp.shared_expert.down_proj"),
    fused=(*LLAMA.fused, SHARED_EXPERT),
    pairs=(),
    outputs=(*LLAMA.outputs, "mlp.shared_expert.down_proj"),
    experts=ExpertNames(),
    kept=(("mlp.gate", ROUTER), ("mlp.shared_expert_gate", ROUTER)),
)

OLMOE = replace(MIXTRAL, others=QWEN3.others, experts=ExpertNames(), kept=(("mlp.gate", ROUTER),))

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
    others=(*NORMS, "mlp.moe_statics"),
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
    others=(*NORMS, "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
    fused=(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), *GLM4_MOE.fused[1:]),
    kept=(*GLM4_MOE.kept, ("self_attn.kv_b_proj", "layer that vLLM takes apart")),
)

HUNYUAN_MOE = replace(
    OLMOE,
    linears=(*OLMOE.linears, *_SHARED_MLP, "mlp.shared_mlp.down_proj"),
    others=HUNYUAN_DENSE.others,
    fused=(*OLMOE.fused, _SHARED_MLP),
    outputs=(*OLMOE.outputs, "mlp.shared_mlp.down_proj"),
    kept=(("mlp.gate.wg", ROUTER),),
)
