"""The page of a run: what stands in it, and what is refused before anything is measured."""

import json
import xml.etree.ElementTree as xml
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import requant
from requant import figures
from requant.cli import main
from requant.errors import InputError
from requant.figures import Map, maps
from requant.recipe import Recipe
from requant.report import REPORT_FILE, Report
from requant.settings import Calibration, Distillation, Selection, Training
from requant_kernels.errors import CheckpointError
from requant_kernels.scheme import WeightScheme

W3 = WeightScheme(3, 32, symmetric=False)


class Page(HTMLParser):
    """Rows of its tables, its headings, and each picture as parsed XML."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self._into: list[str] | None = None
        self.feed(self.text)
        ends = [part.partition("</svg>") for part in self.text.split("<svg")[1:]]
        self.pictures = [xml.fromstring(f"<svg{head}{end}") for head, end, _ in ends]

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "h1", "h2"):
            self._into = self.rows[-1] if tag in ("td", "th") else self.headings
            self._into.append("")

    def handle_endtag(self, tag: str) -> None:
        self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data

    def row(self, name: str) -> list[str]:
        [found] = [row[1:] for row in self.rows if row[0] == name]
        return found


@pytest.fixture(scope="module")
def run(micro_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A checkpoint whose run took a path integral and distilled; and its report."""
    out = tmp_path_factory.mktemp("run") / "out"
    recipe = Recipe(
        W3,
        "learned",
        outliers=0.004,
        significant=0.001,
        calibration=Calibration(samples=4, seqlen=32),
        selection=Selection(sensitivity="pqi", intervals=4),
        training=Training(2),
        distillation=Distillation(2),
    )
    return out, requant.quantize(micro_llama, out, recipe)


def test_it_is_read_back_as_it_was_written(run: tuple[Path, Report], quantized: Path) -> None:
    out, report = run
    assert Report.of(out) == report
    assert Report.of(quantized).total == requant.inspect(quantized)[1]


def test_matrices_share_the_integral(run: tuple[Path, Report]) -> None:
    _, report = run
    [integral] = report.calibration["integrals"]
    assert set(integral["matrices"]) == {row.name for row in report.layers if row.scheme}
    assert sum(integral["matrices"].values()) == pytest.approx(integral["integral"])
    assert integral["error_percent"] == pytest.approx(100 * (integral["integral"] / integral["measured"] - 1), abs=1e-3)


def test_a_page_says_all_that_is_known(run: tuple[Path, Report], micro_llama: Path, tmp_path: Path) -> None:
    out, report = run
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 60)
    command = ["report", str(out), "-o", str(tmp_path / "page.html"), "--text", str(text), "--against"]
    assert main([*command, str(micro_llama), "--seqlen", "32", "--tokens", "320", "--device", "cpu"]) == 0
    page = Page(tmp_path / "page.html")
    assert page.headings == [
        f"{micro_llama.name}, quantized by requant",
        "Perplexity",
        "Loss that rounding adds",
        "True bits a weight",
        "Sparse entries",
        "Error of the weights",
        "Layers",
        "Recipe",
    ]
    before, after = (requant.evaluate(one, text, seqlen=32, tokens=320, device="cpu") for one in (micro_llama, out))
    assert page.row(str(micro_llama)) == [f"{before.perplexity:.4f}", "1.0000"]
    assert page.row(str(out)) == [f"{after.perplexity:.4f}", f"{after.perplexity / before.perplexity:.4f}"]
    assert "10 non-overlapping windows of 32" in page.text
    total = report.total
    assert page.row("true bits a weight")[0].startswith(f"{total.bits_per_weight:.2f}:")
    assert page.row("path integral")[0].startswith(f"{report.calibration['integrals'][0]['integral']:.5f} nats")
    assert page.row("remark")[0].startswith("training through the whole model took the divergence")
    for row in report.layers:
        shape, scheme, bits, *_ = page.row(row.name)
        assert (shape, scheme) == (f"{row.shape[0]} x {row.shape[1]}", row.describe())
        assert float(bits) == pytest.approx(row.bits_per_weight, abs=0.005)
    kinds = {row.name.split(".", 3)[3] for row in report.layers if row.scheme}
    for picture in page.pictures:
        texts = {"".join(one.itertext()).strip() for one in picture.iter("{http://www.w3.org/2000/svg}text")}
        assert kinds | {"block", "0", "3"} <= texts


def test_a_page_needs_nothing_else_and_is_always_the_same(quantized: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        requant.write_report(quantized, tmp_path / name)
    page = Page(tmp_path / "a")
    assert (tmp_path / "b").read_text() == page.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert page.headings[1:] == ["True bits a weight", "Sparse entries", "Error of the weights", "Layers", "Recipe"]
    assert "<script" not in page.text
    assert page.text.count('href="') == page.text.count('href="#') + page.text.count('href="data:')
    assert page.row("calibration") == ["none"]


def test_what_aweq_decided_has_its_maps(tiny, words: None, tmp_path: Path) -> None:
    recipe = replace(requant.recipe.load_recipe("aweq-w8a8"), calibration=Calibration(samples=4, seqlen=32))
    report = requant.quantize(tiny("llama", num_hidden_layers=1), tmp_path / "out", recipe)
    requant.write_report(tmp_path / "out", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert {"Equalization", "Bias correction"} <= set(page.headings)
    assert [row[1] for row in page.rows if row[0] == "remark"] == report.remarks()


def test_names_are_text(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / REPORT_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "<b>&amp;"}))
    requant.write_report(checkpoint, tmp_path / "page.html")
    assert Page(tmp_path / "page.html").headings[0] == "<b>&amp;, quantized by requant"


def test_layers_that_share_a_place() -> None:
    values = {"model.layers.0.experts.0.up": 1.0, "model.layers.0.experts.1.up": 4.0, "lm_head": 9.0, "h.12.fc": 2.0}
    assert Map("", "", values).cells() == {("experts.*.up", 0): 5.0, ("fc", 12): 2.0}
    weights = {"model.layers.0.experts.0.up": 1.0, "model.layers.0.experts.1.up": 2.0, "h.12.fc": 5.0}
    assert Map("", "", values, weights).cells() == {("experts.*.up", 0): 3.0, ("fc", 12): 2.0}


def test_a_map_without_a_value_is_not_drawn(quantized: Path) -> None:
    report = Report.of(quantized)
    dense = replace(report, layers=tuple(replace(row, nnz=0, error=None) for row in report.layers))
    assert [one.title for one in maps(dense)] == ["True bits a weight"]


def test_what_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    with pytest.raises(InputError, match="no such checkpoint folder"):
        requant.write_report(tmp_path / "gone", page)
    with pytest.raises(InputError, match="its folder does not exist"):
        requant.write_report(checkpoint, tmp_path / "gone" / "page.html")
    with pytest.raises(InputError, match="is a folder"):
        requant.write_report(checkpoint, tmp_path)
    with pytest.raises(InputError, match="needs a text"):
        requant.write_report(checkpoint, page, against=["model"])
    with monkeypatch.context() as patch:
        patch.setattr(figures, "find_spec", lambda _: None)
        with pytest.raises(InputError, match=r"pip install 'vllm-requant\[plot\]'"):
            requant.write_report(checkpoint, page)
    report = checkpoint / REPORT_FILE
    whole = json.loads(report.read_text())
    for broken in (
        "{",
        "[]",
        json.dumps({}),
        json.dumps(whole | {"layers": [{"name": "a"}]}),
        json.dumps(whole | {"x": 1}),
    ):
        report.write_text(broken)
        with pytest.raises(CheckpointError, match="not a report of this version"):
            requant.write_report(checkpoint, page)
    report.unlink()
    with pytest.raises(CheckpointError, match=f"has no {REPORT_FILE}"):
        requant.write_report(checkpoint, page)
    assert not page.exists()
