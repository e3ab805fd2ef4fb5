"""The Python interface: the same things as the commands do, returning data."""

from collections.abc import Sequence
from pathlib import Path

import torch

from requant import pipeline
from requant.checkpoint import parse_size
from requant.errors import InputError
from requant.evaluation import Evaluation, evaluate_text
from requant.export import export as export_checkpoint
from requant.figures import require_matplotlib
from requant.hf import load_quantized
from requant.inspection import layer_rows
from requant.page import Measured, render
from requant.recipe import DEFAULT, Recipe, load_recipe
from requant.report import LayerRow, Report, Totals
from requant.settings import EXPORTS
from requant.staging import require_folder, write_whole
from requant.stored import Defect
from requant.texts import read_text
from requant.validation import defects, remarks

__all__ = [
    "check",
    "evaluate",
    "export",
    "inspect",
    "load_quantized",
    "quantize",
    "tensor_parallel_remarks",
    "write_report",
]


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Path = DEFAULT,
    *,
    device: str = "auto",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    resume: bool = False,
    offload_folder: str | Path | None = None,
) -> Report:
    """Quantizes ``model`` (folder, GGUF or hub name) into the folder ``out``, which appears whole or not at all.

    recipe: a Recipe, the name of a preset, or a YAML file. device: where matrices are quantized.
    resume: finished stages of a calibrated run are kept beside ``out`` until it is whole; one that was interrupted goes
    on from there and gives the same bytes. offload_folder: where gradients and the like lie while they are needed,
    memory-mapped instead of in memory.
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
        resume=resume,
        offload_folder=None if offload_folder is None else Path(offload_folder),
    )


def check(folder: str | Path, tensor_parallel: Sequence[int] = ()) -> list[Defect]:
    """All that is wrong with a checkpoint, and each degree of tensor parallelism asked for that its shapes forbid;
    an empty list is a sound one. Needs no GPU, and reads one layer at a time."""
    return list(defects(existing(folder), tuple(tensor_parallel)))


def tensor_parallel_remarks(folder: str | Path, degrees: Sequence[int]) -> list[str]:
    """What degrees of tensor parallelism that ``check`` found nothing against do to a checkpoint's groups, which may
    cost speed or memory but no accuracy."""
    return list(remarks(existing(folder), tuple(degrees)))


def inspect(folder: str | Path) -> tuple[list[LayerRow], Totals]:
    """One row per linear layer, and the totals, from the files' headers. Raises CheckpointError, InputError."""
    return layer_rows(existing(folder))


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    seqlen: int = 2048,
    tokens: int | None = None,
    device: str = "auto",
) -> Evaluation:
    """Perplexity in fp32 of an original model or of a checkpoint, decoded, on a file or on 'wikitext2'.

    tokens: how many at most, from the beginning. Raises InputError, CheckpointError.
    """
    return evaluate_text(model, read_text(text), seqlen=seqlen, tokens=tokens, device=select_device(device))


def export(
    folder: str | Path, out: str | Path, to: str, *, overwrite: bool = False, max_shard_size: str = "5GB"
) -> list[str]:
    """Writes a checkpoint to the folder ``out`` in a format that other programs read: 'dense' or 'compressed-tensors'.
    Returns remarks: what ``out`` does not do as the checkpoint does. Raises InputError, CheckpointError."""
    if to not in EXPORTS:
        raise InputError(f"export: {to!r} is not one of {', '.join(EXPORTS)}")
    limit = parse_size(max_shard_size)
    return export_checkpoint(existing(folder), Path(out), to, overwrite=overwrite, max_shard_bytes=limit)


def write_report(
    folder: str | Path,
    out: str | Path,
    *,
    text: str | Path | None = None,
    against: Sequence[str | Path] = (),
    seqlen: int = 2048,
    tokens: int | None = None,
    device: str = "auto",
) -> None:
    """Writes what is known of the checkpoint ``folder`` to the file ``out``, one HTML page with maps of the model.

    text: measures perplexity on it, first of the models ``against``, then of the checkpoint, as ``evaluate`` does.
    Raises InputError, CheckpointError.
    """
    report, page = Report.of(existing(folder)), Path(out)
    require_folder(page)
    if page.is_dir():
        raise InputError(f"{page}: is a folder; name the file to write, such as report.html")
    if text is None and (against or tokens is not None):
        raise InputError("a perplexity needs a text: --text FILE|wikitext2")
    require_matplotlib("report")
    measured = [
        Measured(str(model), evaluate(model, text, seqlen=seqlen, tokens=tokens, device=device))
        for model in [*against, folder]
        if text is not None
    ]
    write_whole(page, render(report, measured))


def existing(folder: str | Path) -> Path:
    """Raises InputError where there is no such folder."""
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    return path


def select_device(name: str) -> torch.device:
    """auto: the GPU where there is one. Raises InputError where a GPU is asked for and there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
