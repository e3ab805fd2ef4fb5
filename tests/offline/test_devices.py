"""Every way of quantizing on a GPU that is not there: no operation mixes devices, and the checkpoint is the CPU's."""

import pytest
import torch
from requant import api
from requant.aweq.settings import Activations, Equalization
from requant.recipe import Recipe
from requant.settings import Calibration, Distillation, Selection, Training
from requant_kernels.scheme import W8A8_WEIGHTS, WeightScheme

from tests.pretend_cuda import CUDA, pretend_cuda

pytestmark = pytest.mark.usefixtures("words")
FEW = {"calibration": Calibration(samples=4, seqlen=32), "training": Training(steps=2, batch=2)}
GROUPS, CODEBOOK = WeightScheme(3, 32, symmetric=False), WeightScheme(3, codebook=True)
ONCE = Selection(intervals=1)
PAPER = Selection("adaptive", "pqi", 2, 1, restore=True)
EQUALIZED = {"equalization": Equalization("minmax"), "bias_correction": True}
RECIPES = {
    "rtn with outliers": Recipe(GROUPS, outliers=0.01),
    "GPTQ around significant weights": Recipe(GROUPS, "gptq", significant=0.01, selection=ONCE, **FEW),
    "as the paper, on AWQ": Recipe(GROUPS, "awq", outliers=0.004, significant=0.001, selection=PAPER, **FEW),
    "as the paper, on k-means": Recipe(CODEBOOK, "kmeans", outliers=0.004, significant=0.001, selection=PAPER, **FEW),
    "outliers by quartiles": Recipe(GROUPS, "clip", outliers=0.01, selection=Selection("quartiles"), **FEW),
    "true bits": Recipe(GROUPS, "rtn", target_bits=4.6, selection=ONCE, **FEW),
    "learned, distilled": Recipe(GROUPS, "learned", significant=0.01, distillation=Distillation(2, rate=0.01), **FEW),
    "GPTQ, its steps distilled": Recipe(GROUPS, "gptq", significant=0.01, distillation=Distillation(2), **FEW),
    "k-means, its codebooks distilled": Recipe(
        CODEBOOK, "kmeans", significant=0.01, distillation=Distillation(2), **FEW
    ),
    "few bits, AWEQ": Recipe(GROUPS, "gptq", **EQUALIZED, **FEW),
    **{
        f"W8A8 {method}": Recipe(W8A8_WEIGHTS, activations=Activations("static", range=method), **EQUALIZED, **FEW)
        for method in ("mse", "percentile", "minmax")
    },
    "W8A8 dynamic, zero points": Recipe(W8A8_WEIGHTS, activations=Activations("dynamic", False), **EQUALIZED, **FEW),
    "an int8 head": Recipe(GROUPS, quantize_lm_head=True),
}


@pytest.fixture(scope="module")
def small(tiny):
    """Fewer columns still: every operation takes a detour."""
    return tiny("llama", hidden_size=32, intermediate_size=64, head_dim=8, num_hidden_layers=1)


def logits(folder):
    with torch.no_grad():
        return api.load_quantized(folder)(torch.arange(1, 25)[None]).logits


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_device_decides_nothing_but_where(recipe, small, tmp_path):
    with pretend_cuda():
        api.quantize(small, tmp_path / "cuda", recipe, device="cuda")
    api.quantize(small, tmp_path / "cpu", recipe, device="cpu")
    assert api.check(tmp_path / "cuda") == []
    found, expected = logits(tmp_path / "cuda"), logits(tmp_path / "cpu")
    assert float((found - expected).norm() / expected.norm()) < 0.01  # sums may be taken in another order


def test_experts_too(tiny, tmp_path):
    model = tiny("qwen3_moe", num_hidden_layers=1, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32)
    recipe = Recipe(GROUPS, "learned", significant=0.01, selection=ONCE, **FEW)
    with pretend_cuda():
        api.quantize(model, tmp_path / "cuda", recipe, device="cuda")
    assert api.check(tmp_path / "cuda") == []


def test_a_checkpoint_is_evaluated_there(quantized):
    with pretend_cuda(), torch.no_grad():
        there = api.load_quantized(quantized).to(CUDA)(torch.arange(1, 25, device=CUDA)[None]).logits
        assert there.is_cuda
        there = there.cpu()
    torch.testing.assert_close(there, logits(quantized), rtol=1e-4, atol=1e-5)


def test_it_refuses_what_a_gpu_refuses():
    with pretend_cuda():
        a = torch.ones(3, device=CUDA)
        with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
            a + torch.ones(3)
        assert (a + torch.tensor(1.0)).is_cuda
        assert not a.cpu().is_cuda
        assert a.sum().item() == 3
