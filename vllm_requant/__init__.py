"""Serves requant checkpoints with vLLM: `vllm serve CHECKPOINT`, nothing else to do; and other models, rounded while
they are loaded: `vllm serve MODEL --quantization requant`."""

import logging


def register() -> None:
    """Entry point ``vllm.general_plugins``: makes the method known, in every process of vLLM, as often as it likes.

    It patches nothing and can not fail for users of other models: an untested vLLM is refused when a requant
    checkpoint is opened, not here.
    """
    from requant_kernels.scheme import QUANT_METHOD
    from vllm.model_executor.layers.quantization import register_quantization_config

    from vllm_requant.config import RequantConfig

    register_quantization_config(QUANT_METHOD)(RequantConfig)
    # vLLM configures its own logger only, and later than this: our lines follow it wherever it writes.
    for ours in ("requant_kernels", "vllm_requant"):
        logging.getLogger(ours).parent = logging.getLogger("vllm")
