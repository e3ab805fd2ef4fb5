"""Blocks of attention and routed experts, or an MLP where a model begins with some that are dense."""

from dataclasses import replace
from typing import Any

from requant.architecture import Architecture
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


def with_shared(base: Architecture, module: str, **changes: Any) -> Architecture:
    """``base`` with an expert that takes every token: the block's ``module``, of three layers."""
    gate_up, down = (f"{module}.gate_proj", f"{module}.up_proj"), f"{module}.down_proj"
    return replace(
        base,
        linears=(*base.linears, *gate_up, down),
        fused=(*base.fused, gate_up),
        outputs=(*base.outputs, down),
        **changes,
    )


QWEN_MOE = with_shared(
    LLAMA,
    "mlp.shared_expert",
    pairs=(),
    experts=ExpertNames(),
    kept=(("mlp.gate", ROUTER), ("mlp.shared_expert_gate", ROUTER)),
)

OLMOE = replace(MIXTRAL, others=QWEN3.others, experts=ExpertNames(), kept=(("mlp.gate", ROUTER),))

GLM4_MOE = with_shared(
    LLAMA, "mlp.shared_experts", others=OLMOE.others, pairs=(), experts=OLMOE.experts, kept=OLMOE.kept
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

HUNYUAN_MOE = with_shared(OLMOE, "mlp.shared_mlp", others=HUNYUAN_DENSE.others, kept=(("mlp.gate.wg", ROUTER),))
