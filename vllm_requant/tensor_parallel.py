"""A degree of tensor parallelism that a model's shapes forbid, refused in the words of `requant check --tp`."""

from requant_kernels.errors import SchemeError
from requant_kernels.tensor_parallel import Shape, obstacles
from vllm.config import VllmConfig

# What configurations call the MLP's inner width; where they have the first, the second is that of routed experts.
WIDTHS = ("shared_intermediate_size", "intermediate_size", "ffn_dim")


def refuse_degree(config: VllmConfig) -> None:
    """Raises SchemeError where vLLM would stop later, at an assertion that says nothing.

    Too many ranks for its attention heads it has refused before a plugin is asked, in words of its own.
    """
    model, degree = config.model_config, config.parallel_config.tensor_parallel_size
    text = model.hf_text_config
    widths = [getattr(text, name, None) for name in WIDTHS]
    shape = Shape.of(
        text,
        model.model_arch_config.total_num_attention_heads,
        model.get_total_num_kv_heads(),
        next((width for width in widths if isinstance(width, int)), degree),  # an unknown width is vLLM's to refuse
    )
    if found := obstacles(shape, degree):
        raise SchemeError(f"tensor parallelism: {'; '.join(found.values())}")
