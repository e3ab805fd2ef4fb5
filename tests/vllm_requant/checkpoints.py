"""Small checkpoints with any mixture of schemes, and what they decode to; random, so that no detail can hide."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from requant.models import as_stored
from requant_kernels.layer import layer_from_tensors
from requant_kernels.reference import dequantize, linear
from requant_kernels.rounding.layer import round_layer
from requant_kernels.scheme import CheckpointScheme, LayerScheme
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.kernels.strategies import random_w8a8, random_weight

# Six heads of 32: two and three ranks divide them, and cut groups of 64 and 128 columns in the middle.
_SIZES = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "vocab_size": 384}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_COMMON = _SIZES | _TOKENS | {"max_position_embeddings": 256, "tie_word_embeddings": False}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, num_key_value_heads=2, intermediate_size=384),
    # biases of q, k, v; one key/value head, which every rank must get; twelve others, for four ranks too
    "qwen2": Qwen2Config(
        **_COMMON | {"hidden_size": 384, "num_attention_heads": 12}, num_key_value_heads=1, intermediate_size=384
    ),
    # q, k, v and gate, up are fused in the file already
    "phi3": Phi3Config(**_COMMON, num_key_value_heads=2, intermediate_size=384),
    # biases everywhere, plain column-parallel layers
    "opt": OPTConfig(**_COMMON, ffn_dim=384, word_embed_proj_dim=192),
}

# Models that are only served in flight: here vLLM puts the file's rows of q, k, v in another order.
OTHERS: dict[str, PreTrainedConfig] = {
    "falcon": FalconConfig(**_COMMON, num_kv_heads=2, new_decoder_architecture=True),
}

# For output heads: the vocabulary of 380 is padded to 384.
HEADS: dict[str, PreTrainedConfig] = {
    kind: LlamaConfig(
        **_COMMON | {"vocab_size": 380, "tie_word_embeddings": kind == "tied"},
        num_key_value_heads=2,
        intermediate_size=384,
    )
    for kind in ("tied", "untied")
}

# Of experts 320 wide: two ranks cut groups of 64 columns in the middle.
_EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
EXPERT_CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**_COMMON, **_EXPERTS, num_local_experts=4, intermediate_size=320),
    # a dense block, and shared experts in the other
    "qwen2_moe": Qwen2MoeConfig(
        **_COMMON,
        **_EXPERTS,
        num_experts=4,
        moe_intermediate_size=320,
        intermediate_size=384,
        shared_expert_intermediate_size=192,
        mlp_only_layers=[0],
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_COMMON, **_EXPERTS, num_experts=4, moe_intermediate_size=320, intermediate_size=384, head_dim=32
    ),
}


def random_model(kind: str, folder: Path) -> Path:
    return random_of((CONFIGS | OTHERS | HEADS | EXPERT_CONFIGS)[kind], folder)


def random_of(config: PreTrainedConfig, folder: Path) -> Path:
    """A small random model as an ordinary folder, without tokenizer."""
    torch.manual_seed(0)
    randomize(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)).save_pretrained(folder)
    return folder


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """``model``, also its biases and norms, which are trivial otherwise."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1 and tensor.dtype.is_floating_point:
            tensor.data += 0.1 * torch.randn_like(tensor)
    return model


def quantize(source: Path, out: Path, scheme: CheckpointScheme, *, density: float = 0.02) -> Path:
    """``source`` with random quantized weights, small enough for stable activations, in every linear layer."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {}
    for seed, (name, tensor) in enumerate(sorted(load_file(source / "model.safetensors").items())):
        layer = scheme.for_layer(name.removesuffix(".weight"))
        if "layers" not in name or tensor.dim() != 2 or layer is None:
            tensors[name] = tensor
            continue
        shape = tuple(tensor.shape)
        if layer.activations:
            weight = random_w8a8(layer.activations, shape, bias_correction=layer.bias_correction, seed=seed)
        else:
            weight = random_weight(layer, shape, density=density, dtype=torch.bfloat16, seed=seed)
        for part, value in weight.to_tensors().items():
            shrinks = part in ("weight_scale", "weight_codebook", "sparse_values", "bias_correction")
            tensors[name.removesuffix("weight") + part] = value / 16 if shrinks else value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = scheme.to_dict()
    (out / "config.json").write_text(json.dumps(config))
    return out


def decoded(checkpoint: Path, folder: Path) -> PreTrainedModel:
    """The float32 model that ``checkpoint`` stands for, its layers computed by the reference; ``folder`` holds it
    meanwhile."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((checkpoint / "config.json").read_text())
    scheme = CheckpointScheme.from_dict(config.pop("quantization_config"))
    stored = load_file(checkpoint / "model.safetensors")
    levels = ("weight_scale", "weight_codebook")
    quantized = {layer for layer, _, part in (name.rpartition(".") for name in stored) if part in levels}
    tensors, layers = {}, {}
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if part == "bias" or layer not in quantized:
            tensors[name] = tensor.float()
        else:
            layers.setdefault(layer, {})[part] = tensor
    weights = {name: layer_from_tensors(scheme.for_layer(name), parts, name) for name, parts in layers.items()}
    tensors |= {f"{name}.weight": dequantize(weight) for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    model = as_stored(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for name, weight in weights.items():
        module = model.get_submodule(name)
        module.forward = partial(linear, weight=weight, bias=module.bias)
    return model


def rounded_blocks(source: Path, scheme: LayerScheme) -> PreTrainedModel:
    """The float32 model ``source`` with all linear layers but its head rounded."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dequantize(round_layer(module.weight.data.bfloat16(), scheme))
    return model


def edit(checkpoint: Path, out: Path, change) -> Path:
    """A copy whose tensors (and whose config, both as dicts) ``change(tensors, config)`` has altered in place."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out
