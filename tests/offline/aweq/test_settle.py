"""A block is settled layer by layer, on what the quantized layers before each one produce."""

from copy import deepcopy

import pytest
import torch
from requant import architectures, models
from requant.aweq.bias_correction import computed_from, held_out
from requant.aweq.ending import Ending
from requant.aweq.error import token_weights
from requant.aweq.installed import install
from requant.aweq.settings import Activations
from requant.aweq.settle import Settler, Side
from requant.errors import InputError
from requant.walk import block_calls, run_block
from requant_kernels.reference import linear as reference_linear
from requant_kernels.rounding import rtn
from requant_kernels.scheme import W8A8_WEIGHTS, LayerScheme, WeightScheme

from tests.offline.aweq.tiny import tiny_model

SAMPLES = [torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(20)]


class Case:
    """The first block of a tiny model, and its layers rounded to nearest."""

    def __init__(self, name="llama with grouped queries", weights=W8A8_WEIGHTS, activations=None, correct=False):
        self.model = tiny_model(name)
        self.architecture = architectures.ARCHITECTURES[self.model.config.model_type]
        blocks = [block for _, block in models.blocks(self.model, self.architecture)]
        calls = block_calls(self.model, blocks, SAMPLES)
        self.hidden, self.keywords, self.block = calls.hidden, calls.keywords[0], blocks[0].requires_grad_(False)
        self.ending = Ending.of([deepcopy(block) for block in blocks], calls.keywords, held_out(calls.hidden)).after(1)
        self.original = deepcopy(self.block)
        self.activations = activations or Activations("dynamic")
        self.scheme = LayerScheme(weights, None, self.activations.scheme, correct)
        self.layers = {name: self.round(name) for name in self.architecture.linears}

    def round(self, name):
        dense = rtn.quantize(self.block.get_submodule(name).weight, self.scheme.weights, dtype=torch.float32)
        return dense.pack_w8a8(self.scheme) if self.scheme.activations else dense.pack()

    def settle(self):
        original, quantized = (Side(block, self.hidden, self.keywords) for block in (self.original, self.block))
        outputs = [run_block(self.original, x, self.keywords) for x in self.hidden]
        activations = dict.fromkeys(self.layers, self.activations)
        settler = Settler(original, outputs, quantized, activations, self.ending)
        return settler.settle(self.architecture.stages, self.layers, dict.fromkeys(self.layers, self.scheme))

    def error(self):
        """Of the block's output, relative."""
        found, wanted = (
            torch.cat([run_block(block, x, self.keywords) - x for x in self.hidden])
            for block in (self.block, self.original)
        )
        return float((found - wanted).norm() / wanted.norm())


def test_the_settled_block_computes_what_its_layers_mean():
    case = Case(activations=Activations("static", range="minmax"))
    layers, _ = case.settle()
    seen = {}
    for name in layers:
        module = case.block.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, n=name: seen.__setitem__((n, "x"), args[0]), prepend=True)
        module.register_forward_hook(lambda m, args, y, n=name: seen.__setitem__((n, "y"), y))
    run_block(case.block, case.hidden[0], case.keywords)
    for name, layer in layers.items():
        layer.validate(name)
        torch.testing.assert_close(seen[name, "y"], reference_linear(seen[name, "x"], layer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_rounding_to_8_bits_costs_little(mode):
    case = Case(activations=Activations(mode))
    case.settle()
    assert case.error() < 0.05


def test_fused_layers_share_their_input_step():
    case = Case(activations=Activations("static"))
    layers, _ = case.settle()
    for group in case.architecture.fused:
        assert len({float(layers[name].input_scale) for name in group}) == 1


def test_a_layer_that_static_steps_cost_too_much_becomes_dynamic_and_is_noted():
    layers, notes = Case(activations=Activations("static", limit=0)).settle()
    assert all(note.switched for note in notes.values())
    assert all(layer.scheme.activations.dynamic and layer.input_scale is None for layer in layers.values())
    _, notes = Case(activations=Activations("static", limit=1.0)).settle()
    assert not any(note.switched for note in notes.values())
    assert all(0 < note.dynamic_error < note.static_error for note in notes.values())


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_no_range_but_that_of_least_error_weighs_every_input(method, monkeypatch):
    monkeypatch.setattr(torch, "outer", lambda *_: pytest.fail("a matrix as large as the inputs is built"))
    Case(activations=Activations("static", range=method)).settle()


@pytest.mark.parametrize("model", ["llama with grouped queries", "opt"])
@pytest.mark.parametrize("weights", [W8A8_WEIGHTS, WeightScheme(3, 32, symmetric=False)], ids=["w8a8", "3 bit"])
def test_after_correction_no_layer_errs_on_average(model, weights):
    mode = "dynamic" if weights == W8A8_WEIGHTS else "none"
    case = Case(model, weights, Activations(mode), correct=True)
    layers, notes = case.settle()
    hidden = computed_from(case.hidden)
    weights = token_weights([run_block(case.original, x, case.keywords) for x in case.hidden])
    for name, note in notes.items():
        local = note.error_with < note.error_without
        assert note.corrected == (local and note.end_with < note.end_without)
        if not note.corrected:
            continue
        found, wanted = (
            Side(block, hidden, case.keywords).inputs([name])[name] for block in (case.block, case.original)
        )
        weight = case.original.get_submodule(name).weight
        triples = list(zip(found, wanted, computed_from(weights), strict=True))
        error = sum(by @ (reference_linear(x, layers[name]) - y @ weight.T) for x, y, by in triples)
        assert float((error / sum(by.sum() for *_, by in triples)).abs().max()) < 1e-4
    assert any(note.corrected for note in notes.values())


def test_a_correction_that_harms_the_models_end_is_not_kept():
    case = Case(weights=WeightScheme(2, 32), activations=Activations("none"), correct=True)
    corrected, _ = case.settle()
    worse = Case(weights=WeightScheme(2, 32), activations=Activations("none"), correct=True)
    # an end that is reached without any correction: quantized as it is, the block leaves what is wanted
    quantized = deepcopy(worse.block)
    for name, layer in worse.layers.items():
        install(quantized.get_submodule(name), layer)
    outputs = [run_block(quantized, x, worse.keywords) for x in held_out(worse.hidden)]
    worse.ending = Ending.of(worse.ending.blocks, worse.ending.keywords, outputs)
    layers, notes = worse.settle()
    last = worse.architecture.stages[-1]
    assert any(layer.bias_correction is not None for layer in corrected.values())
    for name in last:
        assert notes[name].error_with < notes[name].error_without  # the layer alone would keep it
        assert not notes[name].corrected
        assert layers[name].bias_correction is None
        assert worse.block.get_submodule(name).bias is None


def test_layers_that_may_be_served_as_one_are_corrected_together():
    case = Case(weights=WeightScheme(2, 32), activations=Activations("none"), correct=True)
    layers, notes = case.settle()
    for stage in case.architecture.stages:
        kept = [notes[name].corrected for name in stage]
        assert {layers[name].scheme.bias_correction for name in stage} == {any(kept)}
        for name, one in zip(stage, kept, strict=True):
            if any(kept):
                assert bool(layers[name].bias_correction.any()) == one


def test_a_bias_is_created_where_there_is_none():
    case = Case(weights=WeightScheme(2, 32), activations=Activations("none"), correct=True)
    assert case.block.mlp.down_proj.bias is None
    layers, notes = case.settle()
    name = next(name for name, note in notes.items() if note.corrected)
    torch.testing.assert_close(case.block.get_submodule(name).bias, layers[name].bias_correction)


def test_a_static_layer_that_no_token_activates_is_refused_by_name():
    case = Case(activations=Activations("static"))
    case.block.input_layernorm.weight.zero_()
    with pytest.raises(InputError, match=r"self_attn.q_proj: no calibration token activates its input; calibrate on"):
        case.settle()
