"""One measurement: a recipe applied to a model, in a process of its own, and perplexity on one text or more."""

import json
import multiprocessing
import platform
import resource
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from requant import models, sources
from requant.calibrated import CalibratedRun
from requant.calibration import read_windows
from requant.perplexity import perplexity, windows
from requant.recipe import Recipe
from requant.stages import Stages
from requant.texts import read_text
from requant_kernels.reference import dequantize
from requant_kernels.weight import DenseSparseWeight


@dataclass(frozen=True)
class Protocol:
    """Where perplexity is measured: the first ``tokens`` of each of ``texts``, in windows of ``seqlen``."""

    model: str
    texts: tuple[str, ...]
    seqlen: int
    tokens: int

    def perplexities(self, network: Any, tokenizer: Any) -> dict[str, float]:
        found = {}
        for text in self.texts:
            ids = tokenizer(read_text(text).content, add_special_tokens=False, verbose=False).input_ids
            found[Path(text).name] = perplexity(network, windows(torch.tensor(ids), self.seqlen, self.tokens))
        return found


@dataclass(frozen=True)
class Job:
    """recipe None: the model as it is."""

    name: str
    protocol: Protocol
    recipe: Recipe | None

    @property
    def key(self) -> dict[str, Any]:
        """All that decides the figures, without the paths of this machine."""
        named = {"model": Path(self.protocol.model).name, "texts": [Path(text).name for text in self.protocol.texts]}
        recipe = self.recipe.to_dict() if self.recipe else None
        return asdict(self.protocol) | named | {"recipe": recipe}


@dataclass(frozen=True)
class Row:
    """bits: true ones a weight; seconds, peak_gib: of quantizing; summary: what calibration reports; job: Job.key."""

    name: str
    bits: float
    sparse_percent: float
    perplexities: dict[str, float]
    seconds: float
    peak_gib: float
    summary: dict[str, Any]
    job: dict[str, Any]


def measure(job: Job, kept: Path | None = None) -> Row:
    """kept: where finished stages of quantizing lie, for when it is interrupted; seconds are then those of the last."""
    source = sources.resolve(job.protocol.model)
    network, tokenizer = sources.load(source, torch.float32), source.tokenizer()
    architecture = models.ARCHITECTURES[network.config.model_type]
    if job.recipe is None:
        return Row(job.name, 16.0, 0.0, job.protocol.perplexities(network, tokenizer), 0.0, 0.0, {}, job.key)
    linears = models.linears(network, architecture)
    samples = read_windows(job.recipe.calibration, tokenizer)
    torch.manual_seed(job.recipe.seed)
    start = time.monotonic()
    schemes = dict.fromkeys(linears, job.recipe.layer_scheme)
    stages = Stages.opened(kept, {"the job": job.key}) if kept else Stages()
    made = CalibratedRun(network, architecture, schemes, job.recipe, torch.bfloat16, stages).quantize(samples)
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for name, linear in linears.items():
        linear.weight.data.copy_(dequantize(made.layers[name]))
    total = sum(linear.weight.numel() for linear in linears.values())
    layers = made.layers.values()
    return Row(
        job.name,
        sum(layer.stored_bits() for layer in layers) / total,
        100
        * sum(layer.sparse.nnz for layer in layers if isinstance(layer, DenseSparseWeight) and layer.sparse)
        / total,
        job.protocol.perplexities(network, tokenizer),
        seconds,
        peak,
        made.summary(),
        job.key,
    )


def run(jobs: Iterable[Job], path: Path | None) -> list[Row]:
    """A row for each job; those that the JSON file ``path`` holds are taken from there, the others are added to it."""
    earlier = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path and path.exists() else []
    measured, rows = list(earlier), []
    for job in jobs:
        key = json.loads(json.dumps(job.key))
        row = next((row for row in earlier if row.job == key), None)
        if row is None:
            # a process of its own, whose peak memory is then the job's
            folder = path.with_suffix(f".{sha256(json.dumps(key).encode()).hexdigest()[:12]}") if path else None
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(measure, job, folder).result()
            measured.append(row)
            if path and folder:
                everything = [asdict(row) for row in measured]
                path.write_text(json.dumps(conditions() | {"rows": everything}, indent=1) + "\n")
                shutil.rmtree(folder, ignore_errors=True)
        rows.append(row)
    return rows


def conditions() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
