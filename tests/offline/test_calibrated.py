from dataclasses import replace
from pathlib import Path

import pytest
import torch
from requant import api, models
from requant.calibrated import entries
from requant.calibrated.run import CalibratedRun
from requant.calibrated.subject import Subject
from requant.calibration import Windows
from requant.detach.choice import Budget, choose
from requant.errors import InputError
from requant.families.dense import LLAMA
from requant.quantizers.bases import BASES
from requant.recipe import Recipe
from requant.sensitivity.criteria import CRITERIA
from requant.sensitivity.measure import Sensitivity
from requant.settings import BASES as NAMES
from requant.settings import SENSITIVITIES, Calibration, Distillation, Selection, Training
from requant.tuning.distillation import draws
from requant_kernels.reference import dequantize
from requant_kernels.scheme import WeightScheme
from safetensors.torch import load_file
from torch import nn

from tests.offline.sensitivity.conftest import causal_lm

UNIFORM, CODEBOOK = WeightScheme(3, 64, symmetric=False), WeightScheme(3, codebook=True)
FEW = Training(steps=4, batch=2)


def windows(count: int) -> Windows:
    ids = [torch.randint(2048, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(16 * count)]
    return Windows(ids[:count], ids, "random", "0")


def run_of(model: nn.Module, recipe: Recipe) -> CalibratedRun:
    names = models.linears(model, LLAMA)
    schemes = dict.fromkeys(names, recipe.layer_scheme)
    return CalibratedRun(Subject(model, LLAMA, schemes, recipe, torch.bfloat16))


def divergence(student: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = teacher(ids).logits.log_softmax(-1), student(ids).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture
def model(micro_llama: Path) -> nn.Module:
    return causal_lm(micro_llama)


@pytest.mark.parametrize("base", NAMES)
@pytest.mark.parametrize("sparse", [0.0, 0.005], ids=["dense", "sparse"])
def test_every_base_gives_a_working_model(micro_llama: Path, model: nn.Module, base: str, sparse: float) -> None:
    weights = CODEBOOK if base == "kmeans" else UNIFORM
    recipe = Recipe(weights, base, significant=sparse, selection=Selection(intervals=1), training=FEW)
    calibrated = run_of(model, recipe).quantize(windows(4))
    linears = models.linears(model, LLAMA)
    assert calibrated.layers.keys() == linears.keys()
    entries = sum(layer.sparse.nnz for layer in calibrated.layers.values() if layer.sparse)
    assert entries == round(sparse * sum(linear.weight.numel() for linear in linears.values()))
    for name, layer in calibrated.layers.items():
        layer.validate(name)
        linears[name].weight.data.copy_(dequantize(layer))
    assert divergence(model, causal_lm(micro_llama), windows(1).ids[0]) < 0.2


def test_names_in_recipes_are_those_of_the_code() -> None:
    assert tuple(BASES) == NAMES
    assert tuple(CRITERIA) == SENSITIVITIES


@pytest.mark.parametrize("rate", [0.0, 0.02], ids=["levels", "codes"])
def test_distillation_trains_what_is_stored(micro_llama: Path, model: nn.Module, rate: float) -> None:
    original, recipe = causal_lm(micro_llama), {"base": "learned", "training": Training(steps=0)}
    before = run_of(model, Recipe(WeightScheme(2, 64, False), **recipe)).quantize(windows(4))
    settings = Distillation(steps=8, batch=4, rate=rate)
    after = run_of(model, Recipe(WeightScheme(2, 64, False), **recipe, distillation=settings)).quantize(windows(4))
    assert before.gain is None
    assert after.gain.kept
    _, held_out = draws(len(after.windows.slots), 32, 0)
    found = []
    for calibrated in (before, after):
        for name, linear in models.linears(model, LLAMA).items():
            linear.weight.data.copy_(dequantize(calibrated.layers[name]))
        found.append(sum(divergence(model, original, after.windows.slots[i]) for i in held_out) / len(held_out))
    assert found == pytest.approx([after.gain.before, after.gain.after], rel=1e-3)


def test_the_same_seed_gives_the_same_tensors(micro_llama: Path) -> None:
    recipe = Recipe(UNIFORM, "learned", significant=0.002, training=FEW, distillation=Distillation(2, rate=0.01))
    runs = [run_of(causal_lm(micro_llama), recipe).quantize(windows(3)) for _ in range(2)]
    for name, layer in runs[0].layers.items():
        for part, tensor in layer.to_tensors().items():
            assert torch.equal(tensor, runs[1].layers[name].to_tensors()[part]), f"{name}.{part}"


@pytest.mark.parametrize("rule", ["magnitude", "quartiles", "adaptive"])
def test_outliers_and_significant_weights_add_up(model: nn.Module, rule: str) -> None:
    recipe = Recipe(UNIFORM, "clip", outliers=0.004, significant=0.001, selection=Selection(rule, "pqi", 2, 1))
    calibrated = run_of(model, recipe).quantize(windows(4))
    total = sum(linear.weight.numel() for linear in models.linears(model, LLAMA).values())
    entries = sum(layer.sparse.nnz for layer in calibrated.layers.values())
    assert entries == pytest.approx(0.005 * total, rel=0.01)
    assert len(calibrated.integrals) == 2


@pytest.mark.parametrize("rule", ["magnitude", "quartiles"])
def test_outliers_that_no_rounding_decides_wait_for_none(model: nn.Module, rule: str, monkeypatch) -> None:
    """They are those that lie beside significant weights, under a rounding that these do wait for."""
    subject = run_of(model, Recipe(UNIFORM, "clip", outliers=0.004, selection=Selection(rule))).subject
    samples = windows(2).ids
    rounded, _ = choose(
        subject.path(rounded=True), samples, Budget(0.004, 0.0), subject.recipe.selection, subject.first_rounded
    )
    monkeypatch.setattr(Subject, "path", lambda *_, **__: pytest.fail("a path is built"))
    masks, _ = entries.choice(subject, samples)
    assert masks.keys() == rounded.keys()
    assert all(torch.equal(mask, rounded[name]) for name, mask in masks.items())


def test_awq_changes_the_model_but_not_its_function(micro_llama: Path, model: nn.Module) -> None:
    run_of(model, Recipe(UNIFORM, "awq")).quantize(windows(2))
    original = causal_lm(micro_llama)
    assert not torch.equal(
        model.model.layers[0].input_layernorm.weight, original.model.layers[0].input_layernorm.weight
    )
    with torch.no_grad():
        torch.testing.assert_close(
            model(windows(1).ids[0]).logits, original(windows(1).ids[0]).logits, atol=1e-4, rtol=1e-4
        )


def test_awq_leaves_layers_alone_that_stay_as_they_were(micro_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(UNIFORM, "awq", ignore=(".*(gate|up)_proj",), calibration=Calibration(samples=2, seqlen=48))
    api.quantize(micro_llama, tmp_path / "out", recipe)
    before, after = load_file(micro_llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(after[name], before[name])


def test_a_model_that_does_not_fit_is_one_line(micro_llama: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(CalibratedRun, "quantize", full)
    recipe = Recipe(UNIFORM, "gptq", calibration=Calibration(samples=2, seqlen=48))
    with pytest.raises(InputError, match=r"does not fit on the device \(CUDA out of memory\); use --device cpu"):
        api.quantize(micro_llama, tmp_path / "out", recipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "mixed"])
def test_a_target_of_true_bits_is_met(model: nn.Module, mixed: bool) -> None:
    recipe = Recipe(UNIFORM, "rtn", target_bits=3.7, mixed=mixed, selection=Selection(intervals=1))
    layers = run_of(model, recipe).quantize(windows(3)).layers
    numel = sum(linear.weight.numel() for linear in models.linears(model, LLAMA).values())
    assert 3.69 <= sum(layer.stored_bits() for layer in layers.values()) / numel <= 3.7
    schemes = {layer.scheme.weights for layer in layers.values()}
    assert (len(schemes) > 1) == mixed
    for unit in models.shared_schemes(model, LLAMA):
        assert len({layers[name].scheme for name in unit}) == 1


@pytest.mark.parametrize("mixed", [False, True], ids=["uniform", "mixed"])
def test_a_target_out_of_reach_costs_no_gradients(model: nn.Module, mixed: bool, monkeypatch) -> None:
    monkeypatch.delattr(Sensitivity, "measure")
    recipe = Recipe(UNIFORM, "rtn", target_bits=1.5, mixed=mixed, selection=Selection(intervals=1))
    with pytest.raises(InputError, match=r"^target of 1\.5 bits: this model can be stored in about"):
        run_of(model, recipe).quantize(windows(3))


@pytest.mark.parametrize("base", ["awq", "gptq"])
def test_weights_restored_afterwards_leave_the_dense_part_alone(micro_llama: Path, base: str) -> None:
    selection = Selection("magnitude", "pqi", steps=2, intervals=1, restore=True)
    plain = Recipe(UNIFORM, base, outliers=0.004, selection=selection)
    before = run_of(causal_lm(micro_llama), plain).quantize(windows(3)).layers
    network = causal_lm(micro_llama)
    after = run_of(network, replace(plain, significant=0.001)).quantize(windows(3)).layers
    linears = models.linears(network, LLAMA)
    more = 0
    for name, layer in after.items():
        assert torch.equal(layer.packed, before[name].packed)
        added = layer.sparse.to_dense() != before[name].sparse.to_dense()
        more += layer.sparse.nnz - before[name].sparse.nnz
        torch.testing.assert_close(dequantize(layer)[added], linears[name].weight[added], atol=1e-3, rtol=1e-2)
    assert more == round(0.001 * sum(linear.weight.numel() for linear in linears.values()))


@pytest.mark.parametrize(("base", "weights"), [("gptq", UNIFORM), ("kmeans", CODEBOOK)])
def test_levels_of_any_base_can_be_distilled(model: nn.Module, base: str, weights: WeightScheme) -> None:
    recipe = Recipe(weights, base, significant=0.002, selection=Selection(intervals=1))
    plain = run_of(model, recipe).quantize(windows(4))
    settings = Distillation(steps=8, range_rate=0.01)
    tuned = run_of(model, replace(recipe, distillation=settings)).quantize(windows(4))
    assert all(torch.equal(layer.packed, plain.layers[name].packed) for name, layer in tuned.layers.items())
    assert tuned.gain.kept
    assert any(
        not torch.equal(dequantize(layer), dequantize(plain.layers[name])) for name, layer in tuned.layers.items()
    )
