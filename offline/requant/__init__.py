"""Makes requant checkpoints: sensitivity, quantizers, the commands. torch, transformers, safetensors; never vllm."""

from typing import Any

__all__ = ["check", "evaluate", "export", "inspect", "load_quantized", "quantize", "write_report"]


def __getattr__(name: str) -> Any:
    """The functions of ``requant.api``, imported when first used: torch and transformers take seconds to load."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from requant import api

    return getattr(api, name)
