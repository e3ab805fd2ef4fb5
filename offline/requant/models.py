"""How to walk a causal language model of transformers, by what its architecture says."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion

from requant.architecture import Architecture
from requant.architectures import ARCHITECTURES, LANGUAGE_MODEL, MULTIMODAL, architecture_of
from requant.errors import InputError
from requant.experts import unfuse


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """By which transformers makes a model of ``config``."""
    return AutoModelForImageTextToText if config.model_type in MULTIMODAL else AutoModelForCausalLM


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights, on the meta device: names and shapes only. Raises InputError where the numbers of
    ``config`` describe none."""
    try:
        with torch.device("meta"):
            return as_stored(auto_class(config).from_config(config))
    except Exception as error:  # transformers checks little: a wrong number may surface as anything
        reason = str(error).strip().split("\n", 1)[0]
        raise InputError(f"config.json: no model can be built from it ({reason})") from None


def as_stored(model: PreTrainedModel) -> PreTrainedModel:
    """``model``, changed so that its parameters are the tensors of its checkpoint, name by name."""
    known = model.config.model_type in (*ARCHITECTURES, *MULTIMODAL)
    architecture = architecture_of(model.config) if known else None
    if architecture and architecture.experts:
        for _, block in blocks(model, architecture):
            unfuse(block, architecture.experts)
    return model


def blocks(model: PreTrainedModel, architecture: Architecture) -> Iterator[tuple[str, nn.Module]]:
    """(full name, decoder block), first to last."""
    for index, block in enumerate(model.get_submodule(architecture.blocks)):
        yield f"{architecture.blocks}.{index}", block


def linears(model: PreTrainedModel, architecture: Architecture) -> dict[str, nn.Linear]:
    """The linear layers of all blocks by full name, in the order in which the model runs them.

    Raises InputError where a block holds parameters that the architecture's entry does not know, a variant of the
    model that would otherwise be half-quantized in silence, or can not run without another block.
    """
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        raise InputError("num_kv_shared_layers: blocks that take the keys and values of others are not supported")
    found: dict[str, nn.Linear] = {}
    for prefix, block in blocks(model, architecture):
        local = architecture.of(block)
        known = {*local.linears, *local.others, *dict(local.kept)}
        for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor, _ in stored_tensors(block)):
            if name not in known:
                raise InputError(f"{prefix}.{name}: not known in a block of {model.config.model_type!r}")
        for name in local.linears:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            found[f"{prefix}.{name}"] = linear
    return found


def kept(model: PreTrainedModel, architecture: Architecture) -> dict[str, tuple[torch.Tensor, str]]:
    """The weights of all blocks' layers that are never quantized, such as routers, by full name, and what they are."""
    return {
        f"{prefix}.{name}": (block.get_parameter(f"{name}.weight"), what)
        for prefix, block in blocks(model, architecture)
        for name, what in architecture.of(block).kept
    }


def shared_schemes(model: PreTrainedModel, architecture: Architecture) -> list[list[str]]:
    """The linear layers of all blocks, in order, by sets that must share a scheme."""
    return [
        [f"{prefix}.{name}" for name in names]
        for prefix, block in blocks(model, architecture)
        for names in architecture.of(block).stages
    ]


def towers(model: PreTrainedModel) -> list[str]:
    """What a model has beside its language model: towers for images, projectors; full names."""
    parent, _, language_model = LANGUAGE_MODEL.rpartition(".")
    parts = [name for name, _ in model.get_submodule(parent).named_children()]
    return [f"{parent}.{name}" for name in parts if name != language_model] if language_model in parts else []


def head(model: PreTrainedModel, architecture: Architecture) -> tuple[torch.Tensor, str]:
    """The weight of the output head, and what to say about it."""
    weight = model.get_parameter(f"{architecture.head}.weight")
    tied = model.config.tie_word_embeddings
    return weight, f"output head, tied to {architecture.embeddings}" if tied else "output head"


def outer_tensors(model: PreTrainedModel, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything outside the blocks that is stored: embeddings, final norm, head, a tied weight once; last the towers'
    under the names that the model's files have for them, because vLLM does not know all of transformers'."""
    outer = {n: tensor for n, tensor in stored_tensors(model) if not n.startswith(f"{architecture.blocks}.")}
    beside = {name: outer.pop(name) for name in _beside(model, list(outer))}
    yield from outer.items()
    yield from revert_weight_conversion(model, beside).items()


def names_beside(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Of the names of a file's tensors, those of towers: by the names that ``model`` has for them."""
    if not towers(model):
        return {}
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    renamed = {rename_source_key(name, renamings, [])[0]: name for name in stored}
    return {name: renamed[name] for name in _beside(model, renamed)}


def _beside(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    prefixes = tuple(f"{tower}." for tower in towers(model))
    return [name for name in names if name.startswith(prefixes)]


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of ``module``: parameters, a shared one under its first name only, and the buffers that
    are no mere tables, such as biases of routers."""
    kept = module.state_dict()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in kept:
            yield name, tensor.detach()


def stored_shapes(model: PreTrainedModel, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an unquantized checkpoint of ``model`` holds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model)}
    if model.config.tie_word_embeddings:
        # not by identity: while transformers loads a model, those that are built have no tied weights yet
        shapes.pop(f"{architecture.head}.weight", None)
    return shapes
