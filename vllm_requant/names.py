"""vLLM's name of a layer -> the names in the checkpoint, in which schemes are written.

vLLM fuses layers (q_proj, k_proj, v_proj -> qkv_proj) and for some models renames them (decoder. -> model.decoder.).
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from requant_kernels.errors import SchemeError
from requant_kernels.scheme import OUTPUT_HEAD, CheckpointScheme, LayerScheme
from vllm.model_executor.models.utils import WeightsMapper

TENSOR = ".weight"


def unfused(name: str, packed_modules: Mapping[str, Sequence[str]]) -> list[str]:
    """The layers that vLLM stacks into ``name``, in their order; itself where there are none."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed_modules.get(last, [last])]


def original_names(name: str, mappers: Iterable[WeightsMapper]) -> list[str]:
    """All checkpoint names that ``mappers``, one after the other, turn into ``name``; never empty.

    A mapping by prefix, suffix or substring is run backwards, and so is vLLM's pattern for a model whose layers are all
    under another name than ``model`` (transformers/base.py); whatever that yields counts only if it maps forward to
    ``name`` again. Raises SchemeError where nothing does.
    """
    names = [f"{name}{TENSOR}"]  # what mappers are made for
    for mapper in reversed(list(mappers)):
        names = [old for new in names for old in _candidates(new, mapper) if mapper.apply_list([old]) == [new]]
    if not names and name == OUTPUT_HEAD:  # so called by models of vLLM that have it elsewhere (qwen3_vl.py)
        return [OUTPUT_HEAD]
    if not names:
        raise SchemeError(f"{name}: vLLM renames this layer in a way that can not be traced to the checkpoint")
    return [old.removesuffix(TENSOR) for old in names]


def _candidates(new: str, mapper: WeightsMapper) -> list[str]:
    candidates = [new]
    for old_part, new_part in mapper.orig_to_new_prefix.items():
        if new_part is not None and new.startswith(new_part):
            candidates.append(old_part + new[len(new_part) :])
    for old_part, new_part in mapper.orig_to_new_substr.items():
        if new_part:
            candidates.append(new.replace(new_part, old_part, 1))
    for old_part, new_part in mapper.orig_to_new_suffix.items():
        if new_part and new.endswith(new_part):
            candidates.append(new.removesuffix(new_part) + old_part)
    for pattern, new_part in mapper.orig_to_new_regex.items():
        other = re.fullmatch(r"\^(\w+)\\?\.\(\.\+\)", pattern.pattern)
        if other and new_part == r"model.\1" and new.startswith("model."):
            candidates.append(other[1] + new.removeprefix("model"))
    return candidates


def scheme_of(name: str, scheme: CheckpointScheme, mappers: Iterable[WeightsMapper]) -> LayerScheme | None:
    """The scheme of one unfused layer; where several checkpoint names are possible, the one that is spoken of."""
    found = [scheme.for_layer(old) for old in original_names(name, mappers)]
    if None in found:
        return None
    return next((one for one in found if one != scheme.scheme), scheme.scheme)
