"""The Python interface: the same things as the commands do, returning data."""

from pathlib import Path

import torch

from requant import pipeline
from requant.checkpoint import parse_size
from requant.errors import InputError
from requant.recipe import DEFAULT, Recipe, load_recipe
from requant.report import Report


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Path = DEFAULT,
    *,
    device: str = "auto",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Report:
    """Quantizes ``model`` (folder, GGUF or hub name) into the folder ``out``, which appears whole or not at all.

    recipe: a Recipe, the name of a preset, or a YAML file. device: where matrices are quantized.
    Raises InputError, or SchemeError of requant_kernels for a scheme that does not exist.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return pipeline.run(
        model,
        Path(out),
        chosen,
        device=select_device(device),
        overwrite=overwrite,
        max_shard_bytes=parse_size(max_shard_size),
    )


def select_device(name: str) -> torch.device:
    """auto: the GPU where there is one. Raises InputError where a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
