"""A run as one HTML file that needs nothing else: totals, perplexity, maps of the model, all layers, the recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml
from jinja2 import Environment, StrictUndefined

from requant.evaluation import Evaluation
from requant.figures import draw, maps
from requant.report import Report, megabytes


@dataclass(frozen=True)
class Measured:
    """The perplexity of a model by the name it goes under."""

    name: str
    evaluation: Evaluation


def render(report: Report, measured: Sequence[Measured] = ()) -> str:
    """The page as text. measured: of one text by one protocol; the first is what others are compared with. Raises
    InputError where matplotlib is missing."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["megabytes"] = megabytes
    template = environment.from_string(files("requant").joinpath("data/report.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        total=report.total,
        calibration=report.calibration or {},
        measured=measured,
        maps=[(one, draw(one)) for one in maps(report)],
        recipe=yaml.safe_dump(report.recipe, sort_keys=False),
    )
