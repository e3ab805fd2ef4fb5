"""Tells vLLM's compile cache what the weights themselves put into the traced graph.

A laid-out layer enters the graph with the shapes of its tensors, and with its implementation and integers as constants.
How many sparse entries a layer has and who multiplies it stand in no configuration that vLLM hashes, so a graph that
was compiled for other weights in the same folder would be taken for ours: without their sparse part, for instance.
"""

import hashlib
from typing import Any

from requant_kernels.errors import SchemeError
from requant_kernels.prepared import Prepared
from vllm.config import VllmConfig

KEY = "requant_layouts"  # beside a user's own keys


def tell_compile_cache(config: VllmConfig, names: list[str], prepared: Prepared) -> None:
    """Adds the layout of the layer that is made of the stored layers ``names`` to what ``config`` hashes. vLLM asks for
    that hash in the first forward pass, when every layer has been laid out, each rank its own share.

    Raises SchemeError where ``additional_config``, the only place for it, is an object of another plugin.
    """
    known: Any = config.additional_config
    if not isinstance(known, dict):
        raise SchemeError(
            f"additional_config is a {type(known).__name__}; quantized layers need a dict, by which vLLM's compile "
            "cache can tell their layouts apart"
        )
    tensors = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in prepared.tensors.items()]
    layout = (names, prepared.implementation, prepared.out_features, prepared.meta, tensors)
    chained = f"{known.get(KEY, '')} {layout}"
    # a new dict: the old one may be the user's, and serve another engine of this process
    config.additional_config = known | {KEY: hashlib.sha256(chained.encode()).hexdigest()}
