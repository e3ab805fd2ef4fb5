"""Linear layers [N, K] of well-known models as vLLM runs them: q/k/v and gate/up fused."""

from dataclasses import dataclass

SCHEMES = {"W4 g128": (4, 128), "W3 g128": (3, 128), "W2 g128": (2, 128)}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
DENSITIES = (0.0, 0.001, 0.005, 0.01)


@dataclass(frozen=True)
class Shape:
    model: str
    layer: str
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.model} {self.layer}"

    @property
    def weights(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Load:
    """A symmetric layer in bfloat16 at one number of tokens."""

    shape: Shape
    bits: int
    group: int
    density: float
    tokens: int


def _model(name: str, *layers: tuple[str, int, int]) -> tuple[Shape, ...]:
    return tuple(Shape(name, *layer) for layer in layers)


MODELS = {
    "Llama-3.1-8B": _model(
        "Llama-3.1-8B", ("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 28672, 4096), ("down", 4096, 14336)
    ),
    "Llama-3.2-1B": _model(
        "Llama-3.2-1B", ("qkv", 3072, 2048), ("o", 2048, 2048), ("gate_up", 16384, 2048), ("down", 2048, 8192)
    ),
    "70B TP=4": _model(
        "70B TP=4", ("qkv", 2560, 8192), ("o", 8192, 2048), ("gate_up", 14336, 8192), ("down", 8192, 7168)
    ),
    "Qwen3-32B": _model(
        "Qwen3-32B", ("qkv", 10240, 5120), ("o", 5120, 8192), ("gate_up", 51200, 5120), ("down", 5120, 25600)
    ),
}


@dataclass(frozen=True)
class Experts:
    """A layer of routed experts: each [2 inner, hidden] and [hidden, inner]; a token has ``top`` of them."""

    name: str
    hidden: int
    inner: int
    experts: int
    top: int


EXPERTS = (Experts("Qwen3-30B-A3B", 2048, 768, 128, 8), Experts("Mixtral-8x7B", 4096, 14336, 8, 2))
TINY = _model("tiny", ("square", 48, 256))
