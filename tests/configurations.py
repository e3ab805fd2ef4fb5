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
