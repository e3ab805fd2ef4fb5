"""Which degrees of tensor parallelism a model's shapes allow in vLLM."""

from transformers import PreTrainedModel

from requant.models import ARCHITECTURES


def obstacles(model: PreTrainedModel, degree: int) -> list[str]:
    """One line for each layer of a block that can not be split over ``degree`` ranks; empty where all can.

    vLLM splits attention by heads (key/value heads are copied where there are fewer than ranks) and the MLP by its
    inner width; embeddings are padded and forbid nothing.
    """
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    query, key, *_, down = (f"{architecture.blocks}.0.{name}" for name in architecture.linears)
    heads, width = config.num_attention_heads, model.get_submodule(down).in_features
    kv_heads = getattr(config, "num_key_value_heads", heads)
    lines = []
    if heads % degree:
        lines.append(f"{query}: {heads} attention heads can not be split over {degree} ranks")
    if kv_heads % degree and degree % kv_heads:
        lines.append(f"{key}: {kv_heads} key/value heads can be neither split over nor copied to {degree} ranks")
    if width % degree:
        lines.append(f"{down}: its {width} inputs can not be split over {degree} ranks")
    return lines
