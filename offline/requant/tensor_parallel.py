"""Which degrees of tensor parallelism a model's shapes allow in vLLM."""

from transformers import PreTrainedModel

from requant import models


def obstacles(model: PreTrainedModel, degree: int) -> list[str]:
    """One line for each layer of a block that can not be split over ``degree`` ranks; empty where all can.

    vLLM splits attention by heads (key/value heads are copied where there are fewer than ranks) and the MLP by its
    inner width; embeddings are padded and forbid nothing.
    """
    config = model.config
    linears = models.linears(model, models.ARCHITECTURES[config.model_type])
    query, key, *_, down = linears
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    lines = []
    if heads % degree:
        lines.append(f"{query}: {heads} attention heads can not be split over {degree} ranks")
    if kv_heads % degree and degree % kv_heads:
        lines.append(f"{key}: {kv_heads} key/value heads can be neither split over nor copied to {degree} ranks")
    # of all MLPs of a block, and of its experts, one line for each width
    downs = {
        linears[name].in_features: name for name in reversed(linears) if name.split(".")[-1] == down.split(".")[-1]
    }
    for width, name in downs.items():
        if width % degree:
            lines.append(f"{name}: its {width} inputs can not be split over {degree} ranks")
    return lines
