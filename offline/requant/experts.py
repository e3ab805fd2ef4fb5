"""Routed experts as ordinary linear layers, under the names that they have in checkpoints.

transformers (5.x) holds the experts of a block in two 3-D parameters, and some blocks under another name than their
files; everything here that quantizes, observes or decodes a linear layer wants one module for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from requant_kernels.experts import run_experts
from torch import nn

HOLDER = "mlp"  # what blocks of transformers call the module with their router and their experts, if not as files do


@dataclass(frozen=True)
class ExpertNames:
    """As checkpoints have them. ``holder``: the block's module with router and experts. An expert computes
    down(act(gate(x)) * up(x)). ``moved``: modules and buffers of the holder by transformers' name and the file's."""

    holder: str = HOLDER
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    moved: tuple[tuple[str, str], ...] = ()

    def of(self, block: nn.Module) -> Iterator[tuple[str, str, str]]:
        """(gate, up, down) of each expert of ``block``, relative to it; of none in a dense block."""
        holder = dict(block.named_children()).get(self.holder)
        experts = getattr(holder, "experts", None)
        for index in range(len(experts) if isinstance(experts, UnfusedExperts) else 0):
            prefix = f"{self.holder}.experts.{index}"
            yield f"{prefix}.{self.gate}", f"{prefix}.{self.up}", f"{prefix}.{self.down}"


class UnfusedExperts(nn.ModuleList):
    """E experts of three linear layers each, in the place of transformers' module that holds them as one.

    Its weights are slices of that module's ``gate_up_proj`` [E, 2 I, C] and ``down_proj`` [E, C, I].
    """

    def __init__(self, fused: nn.Module, names: ExpertNames) -> None:
        gates_up, downs = fused.get_parameter("gate_up_proj").detach(), fused.get_parameter("down_proj").detach()
        super().__init__(
            nn.ModuleDict({names.gate: _linear(gate), names.up: _linear(up), names.down: _linear(down)})
            for (gate, up), down in zip((one.chunk(2) for one in gates_up), downs, strict=True)
        )
        act: Any = fused.act_fn
        # a function, or a module, but not the module itself, which would count as one more expert
        self._names, self._act = names, getattr(act, "forward", act)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, C], the experts of each token [T, k] and their weights [T, k] -> [T, C]; only experts that a token
        reaches run."""
        experts = [partial(self._run, expert) for expert in self]
        return run_experts(hidden_states, top_k_weights, top_k_index, experts)

    def _run(self, expert: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = map(expert.get_submodule, (self._names.gate, self._names.up, self._names.down))
        y: torch.Tensor = down(self._act(gate(x)) * up(x))
        return y


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


def unfuse(block: nn.Module, names: ExpertNames) -> None:
    """Gives the experts of ``block``, as transformers builds it, modules of their own; leaves a dense block alone."""
    built = names.holder if hasattr(block, names.holder) else HOLDER
    holder = block.get_submodule(built)
    fused = getattr(holder, "experts", None)
    if fused is None:
        return
    holder.experts = UnfusedExperts(fused, names)
    for old, new in names.moved:
        _move(holder, old, new)
    if names.holder != built:
        _move(block, built, names.holder)


def _move(module: nn.Module, old: str, new: str) -> None:
    """Registers what is called ``old`` somewhere in ``module`` as its own ``new``. The forward of the one that had it
    goes on calling it by its last name, which is now that of an attribute, and registered nowhere."""
    parent, _, name = old.rpartition(".")
    owner = module.get_submodule(parent)
    if name in owner._modules:
        part = owner.get_submodule(name)
        del owner._modules[name]
        module.add_module(new, part)
        owner.__dict__[name] = part
        return
    module.register_buffer(new, owner._buffers.pop(name))
    lend = partial(_lend, module, new, name)
    lend(owner, ())
    owner.register_forward_pre_hook(lend)


def _lend(place: nn.Module, new: str, name: str, owner: nn.Module, _: tuple[object, ...]) -> None:
    """Anew before each run: where a model is loaded or moved to a device, a buffer becomes another tensor."""
    owner.__dict__[name] = place.get_buffer(new)
