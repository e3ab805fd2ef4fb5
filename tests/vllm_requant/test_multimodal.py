"""Models that see images: their language model is quantized, all else is as it was, and vLLM serves them."""

import re
from pathlib import Path

import pytest
import torch
from requant import api
from requant.architectures import MULTIMODAL
from requant.recipe import Recipe
from requant.tuning.distillation import final_state, logits
from requant_kernels.scheme import WeightScheme
from safetensors.torch import load_file
from transformers import AutoProcessor

from tests.vllm_requant.engine import run_jobs
from tests.vllm_requant.test_serving import assert_equal

pytest.importorskip("torchvision", reason="processors of images, and vLLM's models that see them, need torchvision")
from tests.vllm_requant.multimodal import PLACEHOLDERS, image, make

# vLLM has no other dtype for linear attention on CPUs. An image of Gemma 4 is 70 tokens at least.
SERVED = {key: {"dtype": "bfloat16"} for key in ("qwen3_5", "qwen3_5_moe")} | {
    "gemma4": {
        "max_model_len": 256,
        "max_num_batched_tokens": 2048,
        "limit_mm_per_prompt": {"image": 1, "video": 0, "audio": 0},
    }
}
# two blocks of seven, one less without values of its own or with linear attention; with experts and a shared one
LAYERS = {"gemma4": 13, "qwen3_vl_moe": 2 * (4 + 12), "qwen3_5": 13, "qwen3_5_moe": 2 * 15 + 4 + 3}
PROMPTS = {kind: f"It is a truth{PLACEHOLDERS[kind]} universally" for kind in MULTIMODAL}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {kind: make(kind, folder / kind) for kind in MULTIMODAL}


@pytest.fixture(scope="module")
def checkpoints(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, recipe = tmp_path_factory.mktemp("quantized"), Recipe(WeightScheme(4, 64, symmetric=False), outliers=0.01)
    for kind, original in originals.items():
        api.quantize(original, folder / kind, recipe)
    return {kind: folder / kind for kind in MULTIMODAL}


@pytest.fixture(scope="module")
def served(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    common = {"enforce_eager": True, "dtype": "float32", "skip_tokenizer_init": False, "max_num_batched_tokens": 512}
    jobs = [
        common | SERVED.get(k, {}) | {"model": checkpoints[k], "turns": [{"ask": "see", "prompts": [PROMPTS[k]]}]}
        for k in MULTIMODAL
    ]
    results = run_jobs(jobs, tmp_path_factory.mktemp("served") / "all")
    return {kind: one[0] if isinstance(one, list) else one for kind, one in zip(MULTIMODAL, results, strict=True)}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_all_but_the_language_model_is_as_it_was(
    kind: str, originals: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    before, after = (load_file(one[kind] / "model.safetensors") for one in (originals, checkpoints))
    beside = [
        name
        for name in before
        if re.match(r"(model\.)?(visual|vision_tower|embed_vision|multi_modal_projector)\.", name)
    ]
    assert beside
    assert all(torch.equal(after[name], before[name]) for name in beside)
    assert not [name for name in beside for other in after if other != name and other.startswith(f"{name}_")]
    packed = {name for name in after if name.endswith("weight_packed")}
    assert len(packed) == LAYERS.get(kind, 14)
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    assert not api.check(checkpoints[kind])


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_it_is_served(kind: str, served: dict[str, dict], checkpoints: dict[str, Path]) -> None:
    inputs = AutoProcessor.from_pretrained(checkpoints[kind])(text=PROMPTS[kind], images=[image()], return_tensors="pt")
    with torch.no_grad():
        expected = api.load_quantized(checkpoints[kind])(**inputs).logits[0, :-1].log_softmax(-1)
    assert_equal(served[kind], [expected], atol=0.03 if kind.startswith("qwen3_5") else 3e-5)


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_distillation_knows_its_logits(kind: str, checkpoints: dict[str, Path]) -> None:
    model, ids = api.load_quantized(checkpoints[kind]), torch.arange(300, 316)[None]
    with torch.no_grad():
        torch.testing.assert_close(logits(model, final_state(model, ids)), model(input_ids=ids).logits)
