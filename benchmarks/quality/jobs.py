"""One measurement: a recipe applied to a model, in a process of its own, and perplexity on one text or more."""

import json
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from requant import architectures, models, sources
from requant.bench.environment import environment
from requant.calibrated.run import CalibratedRun
from requant.calibrated.subject import Subject
from requant.calibration import read_windows
from requant.perplexity import perplexity, windows
from requant.recipe import Recipe
from requant.stages import CHOICE, Result, Stages
from requant.texts import read_text
from requant_kernels.reference import dequantize
from requant_kernels.weight import DenseSparseWeight

AFTER_CHOICE = ("base", "training", "distillation")  # parts of a recipe that do not decide which entries are sparse


def conditions() -> dict[str, Any]:
    """Where figures come from. JSON."""
    return environment() | {"threads": torch.get_num_threads()}


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
        """All that decides the figures, without the paths of this machine and settings of what does not happen."""
        named = {"model": Path(self.protocol.model).name, "texts": [Path(text).name for text in self.protocol.texts]}
        if self.recipe is None:
            return asdict(self.protocol) | named | {"recipe": None}
        recipe = self.recipe.to_dict()
        if not self.recipe.distillation.steps:
            del recipe["distillation"]
        return asdict(self.protocol) | named | {"recipe": recipe}

    @property
    def choice_key(self) -> dict[str, Any]:
        """All that decides which entries are sparse: a base quantizer is told, not asked."""
        recipe = {key: value for key, value in self.key["recipe"].items() if key not in AFTER_CHOICE}
        return {"model": self.key["model"], "recipe": recipe}


@dataclass(frozen=True)
class Row:
    """bits: true ones a weight; seconds, peak_gib: of quantizing; summary: what calibration reports; job: Job.key;
    conditions: where and when, for rows of one file may come from several machines."""

    name: str
    bits: float
    sparse_percent: float
    perplexities: dict[str, float]
    seconds: float
    peak_gib: float
    summary: dict[str, Any]
    job: dict[str, Any]
    conditions: dict[str, Any] = field(default_factory=conditions)


class SharedChoice(Stages):
    """Stages of one job, but for the choice of sparse entries, which all jobs that choose alike make once.

    ``seconds`` and ``peak_gib``: what it cost the job that made it, where that was an earlier one.
    """

    def __init__(self, own: Stages, choices: Stages) -> None:
        self._own, self._choices, self._made = own, choices, False
        self.seconds, self.peak_gib = 0.0, 0.0

    def kept(self, name: str, make: Callable[[], Result]) -> Result:
        if name != CHOICE:
            return self._own.kept(name, make)

        def timed() -> Result:
            start = time.monotonic()
            tensors, facts = make()
            self._made = True
            return tensors, facts | {"seconds": time.monotonic() - start, "peak_gib": peak_gib()}

        tensors, facts = self._choices.kept(name, timed)
        if not self._made:
            self.seconds, self.peak_gib = facts["seconds"], facts["peak_gib"]
        return tensors, facts


def peak_gib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(job: Job, kept: Path | None = None) -> Row:
    """kept: a folder for finished stages of quantizing, for when it is interrupted (seconds are then those of the last
    run) and for jobs that choose the same sparse entries."""
    source = sources.resolve(job.protocol.model)
    network, tokenizer = sources.load(source, torch.float32), source.tokenizer()
    architecture = architectures.architecture_of(network.config)
    if job.recipe is None:
        return Row(job.name, 16.0, 0.0, job.protocol.perplexities(network, tokenizer), 0.0, 0.0, {}, job.key)
    linears = models.linears(network, architecture)
    samples = read_windows(job.recipe.calibration, tokenizer, job.recipe.seed)
    torch.manual_seed(job.recipe.seed)
    start = time.monotonic()
    schemes = dict.fromkeys(linears, job.recipe.layer_scheme)
    stages = SharedChoice(_opened(kept, job.key), _opened(kept, job.choice_key))
    subject = Subject(network, architecture, schemes, job.recipe, torch.bfloat16)
    made = CalibratedRun(subject, stages).quantize(samples)
    seconds, peak = time.monotonic() - start + stages.seconds, max(peak_gib(), stages.peak_gib)
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


def _opened(kept: Path | None, key: dict[str, Any]) -> Stages:
    return Stages.opened(folder_of(kept, key), {"the job": key}) if kept else Stages()


def folder_of(kept: Path, key: dict[str, Any]) -> Path:
    return kept / sha256(json.dumps(key).encode()).hexdigest()[:12]


def run(jobs: Iterable[Job], path: Path | None) -> list[Row]:
    """A row for each job; those that the JSON file ``path`` holds are taken from there, the others are added to it."""
    earlier = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path and path.exists() else []
    measured, rows = list(earlier), []
    kept = path.with_suffix(".stages") if path else None
    for job in jobs:
        key = json.loads(json.dumps(job.key))
        row = next((row for row in earlier if row.job == key), None)
        if row is None:
            # a process of its own, whose peak memory is then the job's
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(measure, job, kept).result()
            measured.append(row)
            if path and kept:
                everything = [asdict(row) for row in measured]
                path.write_text(json.dumps({"rows": everything}, indent=1) + "\n")
                shutil.rmtree(folder_of(kept, job.key), ignore_errors=True)
        rows.append(row)
    if kept:
        shutil.rmtree(kept, ignore_errors=True)
    return rows
