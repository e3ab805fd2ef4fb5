"""What a product of packed weights on a CPU can not do, whichever it is."""

import torch

from requant_kernels.dense_sparse.interface import LayerConfig

GROUP_MULTIPLE = 32


def refused(config: LayerConfig) -> str:
    """The reason, or nothing."""
    weights, group = config.scheme.weights, config.group_size
    for wrong, reason in (
        (config.device.type != "cpu", f"runs on a CPU, not on {config.device.type}"),
        (weights.codebook, "codebooks have no packed product on a CPU"),
        (weights.bits > 4, f"{weights.bits}-bit codes have no packed product with groups on a CPU"),
        (config.dtype != torch.bfloat16, f"activations of {config.dtype}: serve with --dtype bfloat16"),
        (config.stored_dtype != torch.bfloat16, f"scales of {config.stored_dtype} are not exact in bfloat16"),
        (group % GROUP_MULTIPLE, f"group {group} is no multiple of {GROUP_MULTIPLE}"),
    ):
        if wrong:
            return reason
    return ""
