"""The fixture model on the path from its weights to round-to-nearest ones."""

from pathlib import Path as File

import pytest
import torch
from requant.sensitivity.pqi import Path
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def round_to_nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Asymmetric, per row."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((weight - low) / step).round() * step + low


def causal_lm(path: File) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    blocks = model.model.layers.named_modules()
    return {name: module.weight for name, module in blocks if isinstance(module, nn.Linear)}


def path_of(model: nn.Module, bits: int) -> Path:
    parameters = linear_weights(model)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    end = {name: round_to_nearest(weight, bits) for name, weight in start.items()}
    return Path(model.model.layers, parameters, lambda ids: model(input_ids=ids, labels=ids).loss, start, end)


@pytest.fixture
def model(micro_llama: File) -> nn.Module:
    return causal_lm(micro_llama)


@pytest.fixture(scope="session")
def samples(micro_llama: File, persuasion: File) -> list[torch.Tensor]:
    """Four batches of two windows of 128 tokens."""
    ids = AutoTokenizer.from_pretrained(micro_llama)(persuasion.read_text()[:8000]).input_ids
    return list(torch.tensor(ids[:1024]).view(4, 2, 128))
