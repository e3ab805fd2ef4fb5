"""Parts of small configurations that several suites build models from."""

from typing import Any

# Values that are keys in the second block (Gemma 4 31B).
KEYS_AS_VALUES: dict[str, Any] = {
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "layer_types": ["sliding_attention", "full_attention"],
}


def linear_attention(head_dim: int) -> dict[str, Any]:
    """Of a block of linear attention, and one of the usual kind (Qwen3-Next, Qwen3.5)."""
    return {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": head_dim,
        "linear_value_head_dim": head_dim,
    }


# Of a block with a short convolution, and one with attention (LFM2).
CONVOLVED: dict[str, Any] = {"layer_types": ["conv", "full_attention"]}


def state_space(width: int) -> dict[str, Any]:
    """Of Mamba-2 layers of ``width`` channels, twice what the model has (Granite 4, Falcon-H1)."""
    return {
        "mamba_n_heads": width // 32,
        "mamba_d_head": 32,
        "mamba_n_groups": 1,
        "mamba_d_state": 32,
        "mamba_d_ssm": width,
    }


def granite_hybrid(width: int, inner: int) -> dict[str, Any]:
    """Of a block with such a layer, and one with attention, whose MLPs have ``inner`` channels."""
    blocks = {"layer_types": ["mamba", "attention"]}
    return state_space(width) | blocks | {"num_local_experts": 0, "shared_intermediate_size": inner}
