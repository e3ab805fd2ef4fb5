"""Decides, from names and shapes alone, how each linear layer will be stored; refuses before anything is written."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from requant_kernels.packing import WORD
from requant_kernels.scheme import GROUP_SIZES, HEAD_SCHEME, CheckpointScheme, LayerScheme
from transformers import PreTrainedConfig, PreTrainedModel

from requant import architectures, models, output_head
from requant.architecture import Architecture
from requant.aweq.rewrite import Rewriter
from requant.errors import InputError
from requant.recipe import Recipe
from requant.settings import CODEBOOK, EQUALIZED


def plan(config: PreTrainedConfig, recipe: Recipe, producer: dict[str, str]) -> CheckpointScheme:
    """The scheme to be written into config.json. Raises InputError naming the layer, the reason and the way out."""
    architecture = architectures.architecture_of(config)
    model = models.skeleton(config)
    linears = models.linears(model, architecture)
    if recipe.equalization.wanted:
        Rewriter.of(config, architecture, torch.float32)
    if architecture.experts:
        _refuse_for_experts(recipe, config.model_type)
    for key in ("overrides", "ignore"):
        for pattern in getattr(recipe, key):
            if not any(re.fullmatch(pattern, name) for name in linears):
                raise InputError(f"{key} {pattern!r}: matches no linear layer (one is named {next(iter(linears))})")
    head = re.escape(architecture.head)
    scheme = CheckpointScheme(
        recipe.layer_scheme,
        overrides=({head: HEAD_SCHEME} if recipe.quantize_lm_head else {}) | recipe.layer_schemes,
        ignore=(*(() if recipe.quantize_lm_head else (head,)), *_kept(model, architecture), *recipe.ignore),
        producer=producer,
    )
    if recipe.quantize_lm_head and not output_head.scheme_of(scheme, config):
        raise InputError(f"ignore: matches {architecture.head}, which quantize_lm_head is to quantize")
    schemes = {name: scheme.for_layer(name) for name in linears}
    packed: dict[int, dict[str, int]] = {}
    for name, chosen in schemes.items():
        if chosen and not chosen.activations:  # W8A8 has neither words nor groups to fill
            packed.setdefault(chosen.weights.group_size, {})[name] = linears[name].in_features
    if not any(schemes.values()) and not recipe.quantize_lm_head:
        raise InputError("ignore: leaves no layer to quantize")
    _refuse_entries_without_a_place(recipe, schemes.values())
    for group_size, in_features in packed.items():
        _refuse_shapes(in_features, group_size)
    if split := split_fused(scheme, model):
        raise InputError(split[0])
    return scheme


def fitted(scheme: CheckpointScheme, layers: Mapping[str, LayerScheme]) -> CheckpointScheme:
    """``scheme`` with the schemes that ``layers``, all that it quantizes, really have: the commonest as the default,
    one pattern for each of the others, because every lookup of a layer tries all patterns."""
    counts = Counter(layers.values())
    default = max(counts, key=counts.__getitem__)
    others = {one: [re.escape(name) for name in layers if layers[name] == one] for one in counts if one != default}
    return replace(scheme, scheme=default, overrides={"|".join(names): one for one, names in others.items()})


def _refuse_entries_without_a_place(recipe: Recipe, schemes: Iterable[LayerScheme | None]) -> None:
    asked = [name for name in ("target_bits", "outliers", "significant") if getattr(recipe, name)]
    if asked and not any(scheme and scheme.sparse for scheme in schemes):
        raise InputError(
            f"{asked[0]}: no layer to quantize can have a sparse part, which W8A8 layers and the output head never "
            f"have; {'leave it out' if asked[0] == 'target_bits' else 'set it to 0'}"
        )


def _refuse_shapes(in_features: dict[str, int], group_size: int) -> None:
    for name, columns in in_features.items():
        if columns % WORD:
            raise InputError(
                f"{name}: in_features {columns} is not a multiple of {WORD}, so its codes do not fill whole words; "
                f"leave it out with --ignore '{re.escape(name)}'"
            )
    for name, columns in in_features.items():
        if group_size != -1 and columns % group_size:
            fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in in_features.values())]
            raise InputError(
                f"{name}: group size {group_size} does not divide in_features {columns}; "
                f"sizes that divide every layer: {', '.join(map(str, fitting))} (-1 is one group per row)"
            )


def _kept(model: PreTrainedModel, architecture: Architecture) -> list[str]:
    """Patterns of what is never quantized: routers, which are small, and whose wrong decision costs more than any
    rounding, and what a model has beside its language model, where calibration, which is text, does not reach."""
    inside = [rf"{re.escape(architecture.blocks)}\.\d+\.{re.escape(name)}" for name, _ in architecture.kept]
    return [*inside, *(rf"{re.escape(name)}\..*" for name in models.towers(model))]


def _refuse_for_experts(recipe: Recipe, model_type: str) -> None:
    """What needs every token at every layer, and equalization, whose pairs no one has written down for experts."""
    static = any(one.activations and not one.activations.dynamic for one in recipe.all_schemes)
    refusals = {
        f"base {recipe.base!r} (use --base gptq)": recipe.base in (*EQUALIZED, *CODEBOOK),
        "bias correction (use --no-bias-correction)": recipe.bias_correction,
        "static input steps (use --activations dynamic)": static,
    }
    for what, wanted in refusals.items():
        if wanted:
            raise InputError(f"{model_type}: {what} is not available for mixture-of-experts models")


def split_fused(scheme: CheckpointScheme, model: PreTrainedModel) -> list[str]:
    """One line for every set of layers that vLLM runs as one, or with one method, and that ``scheme`` stores in ways
    that do not go together."""
    architecture = architectures.architecture_of(model.config)
    lines = []
    for prefix, block in models.blocks(model, architecture):
        for members in architecture.of(block).fused:
            if len({scheme.for_layer(f"{prefix}.{member}") for member in members}) > 1:
                lines.append(f"{prefix}: {', '.join(members)} run as one layer in vLLM and must share one scheme")
        if architecture.experts:
            experts = [f"{prefix}.{name}" for names in architecture.experts.of(block) for name in names]
            ignored = [name for name in experts if scheme.for_layer(name) is None]
            if 0 < len(ignored) < len(experts):
                lines.append(f"{ignored[0]}: is ignored, but not all experts of its block; it is all or none in vLLM")
    return lines
