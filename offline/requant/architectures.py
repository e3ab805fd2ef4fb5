"""Architectures as data: what a causal language model of transformers consists of, keyed by ``model_type``.

A further architecture is one more entry of ``ARCHITECTURES``, one with a language model inside of ``MULTIMODAL``;
nothing but they and ``families`` knows a module's name.
"""

from dataclasses import replace

from transformers import PreTrainedConfig

from requant.architecture import Architecture
from requant.errors import InputError
from requant.families import dense, experts, hybrid

ARCHITECTURES = {
    "llama": dense.LLAMA,  # SmolLM and SmolLM2 too
    "mistral": dense.LLAMA,
    "ministral3": dense.LLAMA,
    "qwen2": dense.LLAMA,
    "qwen3": dense.QWEN3,
    "smollm3": dense.LLAMA,
    "granite": dense.LLAMA,
    "ernie4_5": dense.LLAMA,
    "qwen3_5_text": hybrid.QWEN3_5,
    "gemma": dense.GEMMA,
    "gemma2": dense.GEMMA2,
    "gemma3_text": dense.GEMMA2,
    "gemma4_text": dense.GEMMA4,
    "phi3": dense.PHI3,
    "glm4": dense.GLM4,
    "exaone4": dense.POST_NORM,
    "cohere": dense.COHERE,
    "cohere2": dense.COHERE,
    "stablelm": dense.STABLELM,
    "nemotron": dense.NEMOTRON,
    "olmo2": dense.POST_NORM,
    "olmo3": dense.POST_NORM,
    "starcoder2": dense.STARCODER2,
    "phi": dense.PHI,
    "seed_oss": dense.LLAMA,
    "hunyuan_v1_dense": dense.HUNYUAN_DENSE,
    "glm": dense.GLM4,
    "apertus": dense.APERTUS,
    "lfm2": hybrid.LFM2,
    "arcee": dense.UNGATED,
    "cwm": dense.LLAMA,
    "helium": dense.LLAMA,
    "granitemoehybrid": hybrid.GRANITE_HYBRID,
    "falcon_h1": hybrid.FALCON_H1,
    "opt": dense.OPT,
    "mixtral": experts.MIXTRAL,
    "qwen2_moe": experts.QWEN_MOE,
    "qwen3_moe": replace(experts.QWEN_MOE, others=dense.QWEN3.others),
    "qwen3_next": hybrid.QWEN3_NEXT,
    "qwen3_5_moe_text": hybrid.QWEN3_5_MOE,
    "olmoe": experts.OLMOE,
    "glm4_moe": experts.GLM4_MOE,
    "ernie4_5_moe": experts.ERNIE_MOE,
    "phimoe": experts.PHIMOE,
    "hunyuan_v1_moe": experts.HUNYUAN_MOE,
    "exaone_moe": experts.EXAONE_MOE,
    "deepseek_v2": experts.DEEPSEEK,
    "deepseek_v3": experts.DEEPSEEK,
    "glm4_moe_lite": experts.DEEPSEEK,
    "lfm2_moe": hybrid.LFM2_MOE,
    "flex_olmo": replace(experts.OLMOE, others=dense.POST_NORM.others),
}


# Models that take images and the like as well: the architecture of their language model, which None says is that of
# its own ``model_type``, whichever it is. All else of them is stored as it is.
MULTIMODAL: dict[str, Architecture | None] = {
    "gemma3": dense.GEMMA2,
    "gemma4": dense.GEMMA4,
    "qwen2_vl": dense.LLAMA,
    "qwen2_5_vl": dense.LLAMA,
    "qwen3_vl": dense.QWEN3,
    "qwen3_vl_moe": replace(experts.QWEN_MOE, others=dense.QWEN3.others),
    "qwen3_5": hybrid.QWEN3_5,
    "qwen3_5_moe": hybrid.QWEN3_5_MOE,
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
