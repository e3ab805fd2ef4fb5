"""vLLM's compile cache takes no graph that was traced for other weights."""

import shutil

import pytest
import torch
from requant_kernels.errors import SchemeError
from requant_kernels.prepared import Prepared
from requant_kernels.scheme import CheckpointScheme, LayerScheme, SparseScheme, WeightScheme
from vllm.config import VllmConfig

from tests.vllm_requant.checkpoints import decoded, quantize, random_model
from tests.vllm_requant.engine import run_jobs
from tests.vllm_requant.test_serving import PROMPTS, assert_equal, logprobs
from vllm_requant.compile_cache import tell_compile_cache

SCHEME = CheckpointScheme(LayerScheme(WeightScheme(4, 64, symmetric=False), SparseScheme()), ignore=("lm_head",))
LAYER = Prepared("cpu_int4", 8, {"values": torch.zeros(3)}, (64, 32))


def told(*layers: Prepared, **settings) -> str:
    config = VllmConfig(**settings)
    for number, layer in enumerate(layers):
        tell_compile_cache(config, [f"layer {number}"], layer)
    return config.compute_hash()


@pytest.mark.parametrize(
    "other",
    [
        Prepared("cpu_int4_native", 8, {"values": torch.zeros(3)}, (64, 32)),
        Prepared("cpu_int4", 8, {"values": torch.zeros(4)}, (64, 32)),
        Prepared("cpu_int4", 8, {"values": torch.zeros(3).half()}, (64, 32)),
        Prepared("cpu_int4", 8, {}, (64, 32)),
        Prepared("cpu_int4", 8, {"values": torch.zeros(3)}, (64, 64)),
    ],
    ids=["implementation", "shape", "dtype", "without a tensor", "integers"],
)
def test_what_the_graph_depends_on_changes_the_hash(other):
    assert told(LAYER, LAYER) == told(LAYER, LAYER)
    assert len({told(), told(LAYER, LAYER), told(LAYER, other), told(other, LAYER)}) == 4


def test_the_settings_of_a_user_stay_and_count():
    theirs = {"gdn_prefill_backend": "triton"}
    config = VllmConfig(additional_config=theirs)
    tell_compile_cache(config, ["layer"], LAYER)
    assert theirs == {"gdn_prefill_backend": "triton"}
    assert config.additional_config["gdn_prefill_backend"] == "triton"
    assert told(LAYER) != told(LAYER, additional_config=theirs)


def test_an_object_of_another_plugin_is_refused_and_stays():
    class Theirs:
        def compute_hash(self) -> str:
            return "theirs"

    config = VllmConfig(additional_config=(theirs := Theirs()))
    with pytest.raises(SchemeError, match=r"^additional_config is a Theirs; quantized layers need a dict"):
        tell_compile_cache(config, ["layer"], LAYER)
    assert config.additional_config is theirs


@pytest.mark.server
def test_a_folder_whose_weights_were_exchanged_is_compiled_anew(tmp_path):
    """First without any sparse entry, then with some: the first graph knows of none, and would leave them out."""
    source, served = random_model("llama", tmp_path / "llama"), tmp_path / "served"
    job = {"model": served, "dtype": "bfloat16", "prompts": PROMPTS, "cached_graphs": True}

    def serve(run: str) -> tuple[list[torch.Tensor], bool]:
        [result] = run_jobs([job], tmp_path / run, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
        assert_equal(result, logprobs(decoded(served, tmp_path / f"{run} decoded")), atol=0.05)
        return result["logprobs"], "Directly load AOT compilation" in (tmp_path / run / "log").read_text()

    quantize(source, served, SCHEME, density=0.0)
    dense, _ = serve("without sparse parts")
    shutil.rmtree(served)
    quantize(source, served, SCHEME, density=0.02)
    sparse, from_cache = serve("with sparse parts")
    assert not from_cache
    assert any((a - b).abs().max() > 0.2 for a, b in zip(dense, sparse, strict=True)), "nothing was tested"
    again, from_cache = serve("again")
    assert from_cache
    torch.testing.assert_close(again, sparse, rtol=0, atol=0)
