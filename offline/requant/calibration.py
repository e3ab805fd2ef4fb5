"""Calibration text as windows of token ids from all over it, with a hash of what was read."""

from dataclasses import dataclass
from importlib import resources

import torch
from transformers import PreTrainedTokenizerBase

from requant.errors import InputError
from requant.settings import BUILTIN, Calibration
from requant.texts import WIKITEXT2, Text, read_text


@dataclass(frozen=True)
class Windows:
    """ids: int64 [1, seqlen] each, those to measure and quantize on; slots: the whole text cut into such windows, which
    distillation draws from; ``text`` and ``sha256`` identify what they were taken from."""

    ids: list[torch.Tensor]
    slots: list[torch.Tensor]
    text: str
    sha256: str


def read_windows(calibration: Calibration, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Windows:
    """Non-overlapping windows without special tokens: at equal distances, with another seed than 0 at random.

    Raises InputError where the text can not be read, is empty, or holds fewer windows than asked for.
    """
    text = _read(calibration.text)
    ids = torch.tensor(tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
    there = len(ids) // calibration.seqlen
    if there < calibration.samples:
        raise InputError(
            f"calibration text {text.name}: {len(ids)} tokens are {there} windows of {calibration.seqlen}, fewer than "
            f"the {calibration.samples} asked for; give a longer text, or lower --samples or --seqlen"
        )
    if seed:
        order = torch.randperm(there, generator=torch.Generator().manual_seed(seed))
        starts = [int(slot) * calibration.seqlen for slot in order[: calibration.samples].sort().values]
    else:
        stride = (len(ids) - calibration.seqlen) // max(calibration.samples - 1, 1)
        starts = [i * stride for i in range(calibration.samples)]
    chosen, slots = (
        [ids[None, s : s + calibration.seqlen] for s in places]
        for places in (starts, range(0, there * calibration.seqlen, calibration.seqlen))
    )
    return Windows(chosen, slots, text.name, text.sha256)


def _read(spec: str) -> Text:
    if spec == WIKITEXT2:
        raise InputError("calibration: 'wikitext2' is the test split, which perplexity is measured on; give a file")
    return read_text(str(resources.files("requant") / "data" / "austen.txt") if spec == BUILTIN else spec)
