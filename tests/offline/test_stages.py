"""--resume: an interrupted run continues and ends in the same bytes; one of something else is refused by name."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from requant import api
from requant.calibrated import block as rounding
from requant.errors import InputError
from requant.recipe import Recipe
from requant.settings import Calibration, Distillation, Selection, Training
from requant.sources import Source
from requant.stages import Stages
from requant_kernels.scheme import WeightScheme

RECIPE = Recipe(
    WeightScheme(3, 64, symmetric=False),
    significant=0.002,
    calibration=Calibration(samples=4, seqlen=48),
    selection=Selection(intervals=1),
    training=Training(steps=3, batch=2),
)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("base", "target"), [("awq", None), ("learned", None), ("kmeans", 3.8)])
def test_an_interrupted_run_ends_in_the_same_bytes(base, target, micro_llama, tmp_path, monkeypatch):
    weights = WeightScheme(3, codebook=True) if base == "kmeans" else RECIPE.weights
    steps = Distillation(steps=2) if base == "learned" else Distillation()
    recipe = replace(RECIPE, base=base, weights=weights, target_bits=target, distillation=steps)
    api.quantize(micro_llama, tmp_path / "whole", recipe)
    collect, blocks = rounding.collect, []

    def interrupted(block, *arguments):
        blocks.append(block)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return collect(block, *arguments)

    monkeypatch.setattr(rounding, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        api.quantize(micro_llama, tmp_path / "out", recipe, resume=True)
    assert not (tmp_path / "out").exists()
    # where gradients lie meanwhile decides nothing
    api.quantize(micro_llama, tmp_path / "out", recipe, resume=True, offload_folder=tmp_path / "scratch")
    assert len(blocks) == 3 + 2  # of four blocks, the first two were not done again
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "scratch", "whole"]
    assert not list((tmp_path / "scratch").iterdir())


def shifted(tokenizer, text, **options):
    return tokenizer(text[1:], **options)


@pytest.mark.parametrize("changed", ["recipe", "text", "tokens"])
def test_another_run_is_refused_by_name(changed, micro_llama, persuasion, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    recipe = replace(RECIPE, base="gptq", significant=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(rounding, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            api.quantize(micro_llama, tmp_path / "out", recipe, resume=True)
    other = replace(recipe, seed=1)  # which draws other windows
    named = "its tokens, the recipe"
    if changed == "text":
        other = replace(recipe, calibration=Calibration(str(persuasion), 4, 48))
        named = "its tokens, the calibration text, the recipe"
    if changed == "tokens":
        other, named = recipe, "its tokens"
        tokenizer = Source.tokenizer
        monkeypatch.setattr(Source, "tokenizer", lambda source: partial(shifted, tokenizer(source)))
    with pytest.raises(InputError, match=f"--resume: {named} differ from those of the interrupted run"):
        api.quantize(micro_llama, tmp_path / "out", other, resume=True)
    api.quantize(micro_llama, tmp_path / "out", other)  # without the option nothing is in its way


def test_a_fingerprint_that_can_not_be_read_is_named(tmp_path):
    Stages.opened(tmp_path / "kept", {"the model's files": "1"})
    (tmp_path / "kept" / "fingerprint.json").write_text("{")
    with pytest.raises(InputError, match=r"fingerprint\.json: not readable .*; remove .*kept to start anew"):
        Stages.opened(tmp_path / "kept", {"the model's files": "1"})


def test_a_stage_that_can_not_be_read_is_named(tmp_path):
    stages = Stages.opened(tmp_path / "kept", {"the model's files": "1"})
    made = stages.kept("one", lambda: ({"a": torch.arange(3)}, {"n": 1}))
    again = stages.kept("one", lambda: pytest.fail("it was finished"))
    assert torch.equal(again[0]["a"], made[0]["a"])
    assert again[1] == {"n": 1}
    path = tmp_path / "kept" / "one.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=r"one\.safetensors: not readable .*; remove it to repeat this stage"):
        stages.kept("one", lambda: ({}, {}))
