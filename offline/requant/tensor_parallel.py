"""Which degrees of tensor parallelism a checkpoint allows in vLLM, layer by layer."""

from collections.abc import Mapping

from requant_kernels import tensor_parallel
from requant_kernels.scheme import LayerScheme
from transformers import PreTrainedModel

from requant.models import ARCHITECTURES


def obstacles(model: PreTrainedModel, degree: int) -> list[str]:
    """One line for each layer of a block that can not be split over ``degree`` ranks; empty where all can."""
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    query, key, *_, down = (f"{architecture.blocks}.0.{name}" for name in architecture.linears)
    heads = config.num_attention_heads
    shape = tensor_parallel.Shape(
        heads, getattr(config, "num_key_value_heads", heads), model.get_submodule(down).in_features
    )
    layer_of = {"heads": query, "key_value_heads": key, "width": down}
    return [f"{layer_of[field]}: {why}" for field, why in tensor_parallel.obstacles(shape, degree).items()]


def cut_groups(
    model: PreTrainedModel, layers: Mapping[str, tuple[LayerScheme, tuple[int, int]]], degree: int
) -> list[str]:
    """What ``degree`` ranks, which no obstacle forbids, do to groups: one line for each thing that happens, with the
    first layer it happens to and the number of others. layers: (scheme, [N, K]) of each, by full name."""
    row_parallel = ARCHITECTURES[model.config.model_type].row_parallel
    happening: dict[str, list[str]] = {}
    for name, (scheme, (_, columns)) in layers.items():
        what = tensor_parallel.cut_groups(columns, scheme.weights.group_size, degree)
        if what and name.endswith(row_parallel):
            happening.setdefault(what, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {what}"
        for what, names in happening.items()
    ]
