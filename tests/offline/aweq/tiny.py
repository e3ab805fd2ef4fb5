"""Tiny random models of every architecture, with norms and biases that are not the trivial ones."""

import torch
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Exaone4Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    GraniteConfig,
    GraniteMoeHybridConfig,
    HeliumConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from tests.configurations import CONVOLVED, granite_hybrid, linear_attention, state_space

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA = _COMMON | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}

CONFIGS = {
    "llama with grouped queries": LlamaConfig(**_LLAMA),
    "llama with biases": LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
    "llama with tied weights": LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "mistral": MistralConfig(**_LLAMA),
    "qwen2": Qwen2Config(**_LLAMA),
    "qwen3": Qwen3Config(**_LLAMA),
    "qwen3.5": Qwen3_5TextConfig(**_LLAMA, **linear_attention(16)),
    "gemma": GemmaConfig(**_LLAMA),
    "gemma2": Gemma2Config(**_LLAMA),
    "gemma3": Gemma3TextConfig(**_LLAMA),
    "gemma4": Gemma4TextConfig(**_LLAMA, hidden_size_per_layer_input=0, pad_token_id=0, final_logit_softcapping=0.5),
    "granite": GraniteConfig(**_LLAMA, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=4.0),
    "phi3": Phi3Config(**_LLAMA, pad_token_id=0),
    "phi": PhiConfig(**_LLAMA),
    "glm4": Glm4Config(**_LLAMA, pad_token_id=0),
    "exaone4": Exaone4Config(**_LLAMA),
    "olmo2": Olmo2Config(**_LLAMA),
    "cohere": CohereConfig(**_LLAMA),
    "cohere with norms of queries": CohereConfig(**_LLAMA, use_qk_norm=True),
    "cohere2": Cohere2Config(**_LLAMA),
    "stablelm": StableLmConfig(**_LLAMA),
    "stablelm side by side": StableLmConfig(**_LLAMA, use_parallel_residual=True),
    "nemotron": NemotronConfig(**_LLAMA),
    "apertus": ApertusConfig(**_LLAMA),
    "arcee": ArceeConfig(**_LLAMA),
    "helium": HeliumConfig(**_LLAMA),
    "lfm2": Lfm2Config(**_LLAMA, **CONVOLVED),
    "granite hybrid": GraniteMoeHybridConfig(**_LLAMA, **granite_hybrid(128, 96), residual_multiplier=0.5),
    "falcon_h1": FalconH1Config(**_LLAMA, **state_space(128), mlp_multipliers=[0.7, 1.3], ssm_in_multiplier=0.8),
    "starcoder2": Starcoder2Config(**_LLAMA),
    "opt": OPTConfig(**_COMMON, ffn_dim=96, word_embed_proj_dim=64, activation_function="relu"),
    "opt with gelu": OPTConfig(**_COMMON, ffn_dim=96, word_embed_proj_dim=64, activation_function="gelu"),
    "opt with norms after": OPTConfig(**_COMMON, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=False),
}


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """fp32, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.mul_(4)  # the default initialisation leaves a model that hardly does anything
    return model
