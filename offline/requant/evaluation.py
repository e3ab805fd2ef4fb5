"""``requant eval``: an original model or a checkpoint, a text, one number, and the protocol that it hangs on."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from requant_kernels.scheme import QUANT_METHOD
from transformers import PreTrainedTokenizerBase

from requant import sources
from requant.errors import InputError
from requant.hf import load_quantized
from requant.perplexity import perplexity, windows
from requant.progress import track
from requant.texts import Text


@dataclass(frozen=True)
class Evaluation:
    """perplexity, and all that decides it. tokens: windows * seqlen, of which all but one a window are targets."""

    perplexity: float
    model: str
    text: str
    text_sha256: str
    tokenizer: str
    special_tokens: str
    seqlen: int
    windows: int
    tokens: int
    dtype: str

    @property
    def protocol(self) -> str:
        return (
            f"{self.text} (sha256 {self.text_sha256[:12]}), {self.tokenizer}, {self.special_tokens}; "
            f"{self.windows} non-overlapping windows of {self.seqlen} = {self.tokens} tokens, "
            f"{self.seqlen - 1} targets each; {self.dtype}"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"protocol": self.protocol}


def evaluate_text(
    model: str | Path, text: Text, *, seqlen: int, tokens: int | None, device: torch.device
) -> Evaluation:
    """Raises InputError, CheckpointError."""
    source = sources.resolve(model)
    checkpoint = _is_checkpoint(source)
    context = getattr(sources.auto_config(source).get_text_config(), "max_position_embeddings", seqlen)
    if seqlen > context:
        raise InputError(f"seqlen {seqlen}: the model's context is {context} tokens")
    tokenizer = source.tokenizer()
    ids = torch.tensor(tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    batches = windows(ids, seqlen, tokens)
    # fp32, whatever is stored: the figure must not depend on how a machine rounds
    network = load_quantized(source.folder) if checkpoint else sources.load(source, torch.float32)
    value = perplexity(network.to(device), track(batches, len(batches), "evaluating windows"))
    return Evaluation(
        perplexity=value,
        model=source.name,
        text=text.name,
        text_sha256=text.sha256,
        tokenizer=f"{type(tokenizer).__name__} of {len(tokenizer)} tokens",
        special_tokens=special_tokens(tokenizer),
        seqlen=seqlen,
        windows=len(batches),
        tokens=batches.numel(),
        dtype="float32",
    )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """We add none; this says what the tokenizer itself would have added, so that figures can be compared."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    usual = tokenizer("a").input_ids
    if usual == plain:
        return "no special tokens (the tokenizer's own rule adds none)"
    around = tokenizer.convert_ids_to_tokens([token for token in usual if token not in plain])
    return f"no special tokens (the tokenizer's own rule would add {' '.join(around)})"


def _is_checkpoint(source: sources.Source) -> bool:
    """Whether it is ours. Raises InputError for what is neither that nor an unquantized causal language model."""
    if dict(source.raw.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD:
        return True
    sources.refuse_unusable(source)
    return False
