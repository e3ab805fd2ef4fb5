"""What a causal language model of transformers consists of, as data: the form; ``architectures`` has the contents."""

from dataclasses import dataclass, replace
from typing import Literal

from requant_kernels.scheme import OUTPUT_HEAD
from torch import nn

from requant.experts import ExpertNames


@dataclass(frozen=True)
class Pair:
    """A producer whose output channels can be divided by scales that its consumers' columns are multiplied by, exactly.

    through: what lies between. "norm": the producer is a norm, nothing does. "rows": each output row of a linear layer
    meets one column, perhaps multiplied by something else or through a ReLU. "heads": attention, so that the value row
    of a key/value head meets one column for each query head. requires: what config.json must say for it to be exact.
    """

    producer: str
    consumers: tuple[str, ...]
    through: Literal["norm", "rows", "heads"]
    requires: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Where things are. Names inside a block are relative to it, the others are full. ``linears`` starts with what
    makes queries and ends with the MLP's last. ``others``: what else may hold parameters in a block, norms mostly.
    ``pairs``: in the order in which a block runs them. ``norm_offset``: a norm multiplies by weight + norm_offset.
    ``outputs``: the linear layers whose columns tensor parallelism splits. ``experts``: of a mixture-of-experts model.
    ``kept``: linear layers that are never quantized, and what they are. A block has some of ``linears`` and ``kept``:
    all of them, but where blocks differ in kind."""

    blocks: str
    linears: tuple[str, ...]
    others: tuple[str, ...]
    fused: tuple[tuple[str, ...], ...]  # linears that vLLM runs as one, so that they must share a scheme
    pairs: tuple[Pair, ...] = ()
    norm_offset: float = 0.0
    outputs: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    embeddings: str = "model.embed_tokens"
    head: str = OUTPUT_HEAD
    # vLLM hands a quantization to the output heads of these: a tied one needs it for the embeddings as well
    quantizable_heads: tuple[Literal["tied", "untied"], ...] = ("tied", "untied")

    experts: ExpertNames | None = None
    kept: tuple[tuple[str, str], ...] = ()

    @property
    def row_parallel(self) -> tuple[str, ...]:
        """How the names of layers end whose columns tensor parallelism splits."""
        return (*self.outputs, *((self.experts.down,) if self.experts else ()))

    def of(self, block: nn.Module) -> "Architecture":
        """What ``block`` has of it, its experts spelled out."""
        present = {name for name, _ in block.named_modules()}
        experts = list(self.experts.of(block)) if self.experts else []
        return replace(
            self,
            linears=(*filter(present.__contains__, self.linears), *(name for expert in experts for name in expert)),
            fused=(*filter(present.issuperset, self.fused), *((gate, up) for gate, up, _ in experts)),
            kept=tuple(pair for pair in self.kept if pair[0] in present),
        )

    @property
    def stages(self) -> list[tuple[str, ...]]:
        """The linear layers in the order in which a block runs them; those that are fed one tensor together."""
        together = {member: members for members in self.fused for member in members}
        return list(dict.fromkeys(together.get(name, (name,)) for name in self.linears))
