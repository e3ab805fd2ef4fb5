"""The README.md of a checkpoint: what it is, how it was made, what it costs, how to use it."""

from typing import Any

import yaml

from requant.architectures import MULTIMODAL
from requant.report import Report, megabytes
from requant.sources import Source

_CARD = """\
---
{front}
---

# {model}, quantized by requant

{kinds} (`quant_method: requant`, format version 1), made by vllm-requant from `{model}`.

| | |
|---|---|
| linear layers | {layers} quantized, {skipped} as they were (listed with the reason in `requant_report.json`) |
| true bits a weight | {bits:.2f}: every stored bit of the quantized layers over their weights |
| output head | {head} |
| sparse entries | {sparse:.2f} % |
| size of all tensors | {size}, the original {original} |
| calibration | {calibration} |
| made with | {producer} |

## Use

Served by vLLM, with `vllm-requant` installed beside it:

    vllm serve FOLDER

In transformers, decoded to full precision:

    import requant
    model = requant.load_quantized("FOLDER")

`from_pretrained("FOLDER")` of transformers' own classes decodes too, but only after `import requant.hf`: without it,
transformers does not know the format and fills the linear layers with random numbers.

## Recipe

```yaml
{recipe}```
"""


def model_card(report: Report, source: Source) -> str:
    front: dict[str, Any] = {"base_model": report.model} | _license(source)
    task = "image-text-to-text" if source.raw["model_type"] in MULTIMODAL else "text-generation"
    front |= {"library_name": "vllm", "tags": ["requant", "quantized"], "pipeline_tag": task}
    total = report.total
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        model=report.model,
        kinds=_kinds(report),
        layers=total.layers,
        skipped=total.skipped_layers,
        bits=total.bits_per_weight,
        head=report.layers[-1].describe(),
        sparse=total.sparse_percent,
        size=megabytes(total.checkpoint_bytes),
        calibration="{tokens} tokens of {text} (sha256 {sha256:.12})".format(**report.calibration)
        if report.calibration
        else "none",
        original=megabytes(report.original_bytes),
        producer=", ".join(f"{name} {version}" for name, version in report.producer.items()),
        recipe=yaml.safe_dump(report.recipe, sort_keys=False),
    )


def _kinds(report: Report) -> str:
    schemes = [row.scheme for row in report.layers if row.scheme]
    few = "dense low-bit weights plus an unstructured sparse residual"
    kinds = {"int8 weights and int8 inputs" if scheme.activations else few: None for scheme in schemes}
    return "; ".join(kinds).capitalize()


def _license(source: Source) -> dict[str, str]:
    """The licence that the original's own card declares: it binds what is made from it."""
    card = source.folder / "README.md"
    if source.gguf or not card.is_file():
        return {}
    head, *rest = card.read_text(encoding="utf-8", errors="replace").removeprefix("---\n").split("\n---", 1)
    try:
        declared = yaml.safe_load(head) if rest else None
    except yaml.YAMLError:
        return {}
    return {key: declared[key] for key in ("license", "license_name") if isinstance(declared, dict) and key in declared}
