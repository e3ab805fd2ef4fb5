"""Which software made a checkpoint."""

from importlib.metadata import version

import torch
import transformers


def producer() -> dict[str, str]:
    return {"requant": version("vllm-requant"), "torch": torch.__version__, "transformers": transformers.__version__}
