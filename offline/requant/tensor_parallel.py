"""Which degrees of tensor parallelism a checkpoint allows in vLLM, layer by layer."""

from collections.abc import Mapping

from requant_kernels import tensor_parallel
from requant_kernels.scheme import LayerScheme
from transformers import PreTrainedModel

from requant import architectures, models


def obstacles(model: PreTrainedModel, degree: int) -> list[str]:
    """One line for each layer of a block that can not be split over ``degree`` ranks; empty where all can. Of all MLPs
    of a block, and of its experts, one line for each width."""
    config = model.config.get_text_config()
    architecture = architectures.architecture_of(model.config)
    linears = models.linears(model, architecture)
    *_, last = linears
    stages = models.shared_schemes(model, architecture)
    first, *others = next(stage for stage in stages if ".self_attn." in stage[0])
    key = others[0] if others else first  # which makes all three
    linear, state = (next((s[0] for s in stages if part in s[0]), first) for part in (".linear_attn.", ".mamba."))
    heads = config.num_attention_heads
    by_block = [config.per_layer_config[index] for index in range(config.num_hidden_layers)]
    kv_heads = min(getattr(block, "num_key_value_heads", heads) for block in by_block)
    downs = {
        linears[name].in_features: name for name in reversed(linears) if name.split(".")[-1] == last.split(".")[-1]
    }
    lines: dict[str, None] = {}  # in order, each once
    for width, down in downs.items():
        layer_of = {"heads": first, "key_value_heads": key, "width": down, "linear_heads": linear}
        layer_of |= dict.fromkeys(("state_heads", "state_groups"), state)
        shape = tensor_parallel.Shape.of(config, heads, kv_heads, width)
        found = tensor_parallel.obstacles(shape, degree)
        lines |= dict.fromkeys(f"{layer_of[field]}: {why}" for field, why in found.items())
    return list(lines)


def cut_groups(
    model: PreTrainedModel, layers: Mapping[str, tuple[LayerScheme, tuple[int, int]]], degree: int
) -> list[str]:
    """What ``degree`` ranks, which no obstacle forbids, do to groups: one line for each thing that happens, with the
    first layer it happens to and the number of others. layers: (scheme, [N, K]) of each, by full name."""
    row_parallel = architectures.architecture_of(model.config).row_parallel
    happening: dict[str, list[str]] = {}
    for name, (scheme, (_, columns)) in layers.items():
        what = tensor_parallel.cut_groups(columns, scheme.weights.group_size, degree)
        if what and name.endswith(row_parallel):
            happening.setdefault(what, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {what}"
        for what, names in happening.items()
    ]
