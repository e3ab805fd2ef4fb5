"""Runs vLLM engines, one after the other, in a process of their own: `python -m tests.vllm_requant.engine JOBS OUT`.

A job is {"model": folder, "prompts": [[token, ...], ...], **arguments of vllm.LLM}. Its result is either
{"logprobs": [[tokens-1, vocabulary] per prompt], "generated": [[token, ...] per prompt], ...} or {"error": text}.
With "turns", one engine is asked several times, and the result is a list of one for each: a turn is a mapping of
{"ask": one of ASK, by default "generate"; "prompts": others than the job's; **other arguments of the question}.
With "cached_graphs", graphs are compiled and cached as on a GPU. With "interpreted_experts", routed experts run as on
one, in Triton's interpreter.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm import LLM

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Other work may hold a core that vLLM would bind itself to.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
COMMON = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8, "max_logprobs": -1, "seed": 0}


def run_jobs(jobs: list[dict[str, Any]], folder: Path, **environment: str) -> list[Any]:
    """The results of ``jobs``, in order; engines of one rank run inside one process, which saves their start-up."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    parallel = any(_processes(job) > 1 for job in jobs)
    settings = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(parallel))} | environment
    command = [sys.executable, "-m", "tests.vllm_requant.engine", str(folder / "jobs.json"), str(folder / "results.pt")]
    done = subprocess.run(command, cwd=ROOT, env=settings, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (folder / "log").write_text(done.stdout + done.stderr)
    return torch.load(folder / "results.pt")


def _processes(job: dict[str, Any]) -> int:
    return job.get("tensor_parallel_size", 1) * job.get("pipeline_parallel_size", 1)


def _run(job: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    from vllm import LLM

    prompts, turns = job.pop("prompts", []), job.pop("turns", None)
    if job.pop("cached_graphs", False):
        _compile_as_on_a_gpu()
    if job.pop("interpreted_experts", False):
        _interpret_experts()
    backend = "mp" if _processes(job) > 1 else "uni"
    try:
        llm = LLM(**COMMON | {"distributed_executor_backend": backend} | job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    results = []
    for turn in turns or [{}]:
        question = {"prompts": prompts} | turn
        results.append(ASK[question.pop("ask", "generate")](llm, **question))
    llm.llm_engine.engine_core.shutdown()
    return results if turns else results[0]


def _inspect_in_this_process() -> None:
    """vLLM starts a process of ten seconds to look at each class of models, so that CUDA is not touched in this one."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


def _compile_as_on_a_gpu() -> None:
    """On a CPU, vLLM takes another mode than its own, and none of that mode's graphs can be read from the cache."""
    from vllm.config import CompilationMode, VllmConfig
    from vllm.platforms.cpu import CpuPlatform

    settle = CpuPlatform.check_and_update_config

    def stay(config: VllmConfig) -> None:
        settle(config)
        config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        config.compilation_config.compile_sizes = []

    CpuPlatform.check_and_update_config = staticmethod(stay)


def _interpret_experts() -> None:
    """TRITON_INTERPRET must have been set when the process started."""
    from dataclasses import replace

    from requant_kernels.dense_sparse.triton import experts
    from requant_kernels.dense_sparse.triton.table import tables

    import tests.kernels.triton.interpreter_bf16

    assert tests.kernels.triton.interpreter_bf16
    experts.can_implement = lambda scheme, dtype, device: (True, "")
    experts.RoutedExperts.warm_up = lambda *arguments, **limits: None  # there is nothing to compile
    experts.table_of = lambda device: replace(tables()["h200"], pdl=False)


def _generate(
    llm: "LLM",
    prompts: list[list[int]],
    adapter: str | None = None,
    schema: dict[str, Any] | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """``adapter``: folder of a LoRA; ``schema``: of the JSON that has to come out."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    settings = {"temperature": 0, "max_tokens": 4, "prompt_logprobs": -1, "detokenize": False} | sampling
    structured = StructuredOutputsParams(json=schema) if schema else None
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(**settings, structured_outputs=structured),
        use_tqdm=False,
        lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
    )
    return {
        "logprobs": [_table(out.prompt_logprobs[1:]) for out in outputs if out.prompt_logprobs],
        "generated": [list(out.outputs[0].token_ids) for out in outputs],
        "generated_logprobs": [_table(out.outputs[0].logprobs) for out in outputs if out.outputs[0].logprobs],
        "text": [out.outputs[0].text for out in outputs],
        "cached": [out.num_cached_tokens for out in outputs],
    }


def _table(positions: list[dict[int, Any]]) -> torch.Tensor:
    """[positions, tokens that were asked for], by their numbers"""
    return torch.tensor([[entry[token].logprob for token in sorted(entry)] for entry in positions])


def _see(llm: "LLM", prompts: list[str]) -> dict[str, Any]:
    """Log-probabilities of ``prompts``, texts with one image each, after the image's tokens have been put in."""
    from vllm import SamplingParams

    from tests.vllm_requant.multimodal import image

    asked = [{"prompt": prompt, "multi_modal_data": {"image": image()}} for prompt in prompts]
    outputs = llm.generate(asked, SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=-1), use_tqdm=False)
    return {"logprobs": [_table(out.prompt_logprobs[1:]) for out in outputs]}


def _embed(llm: "LLM", prompts: list[list[int]]) -> dict[str, Any]:
    outputs = llm.embed([{"prompt_token_ids": prompt} for prompt in prompts], use_tqdm=False)
    return {"embeddings": torch.tensor([out.outputs.embedding for out in outputs])}


def _reload(llm: "LLM", prompts: list[list[int]]) -> dict[str, Any]:
    try:
        llm.collective_rpc("reload_weights")
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


def _methods(llm: "LLM", prompts: list[list[int]]) -> dict[str, Any]:
    """Which class quantizes each layer, the configuration that chose it, and whether vLLM knows of us."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    def look(model: torch.nn.Module) -> dict[str, str]:
        named = {name: getattr(module, "quant_method", None) for name, module in model.named_modules()}
        return {name: type(method).__name__ for name, method in named.items() if method}

    config = llm.llm_engine.vllm_config.quant_config
    [methods] = llm.apply_model(look)
    settings = {name: _repr(value) for name, value in vars(config).items()} if config else {}
    return {
        "methods": methods,
        "config": {"class": type(config).__name__} | settings,
        "requant": "requant" in QUANTIZATION_METHODS,
    }


def _repr(value: Any) -> str:
    """vLLM fills some lists from sets of names, in an order that changes from process to process."""
    return repr(sorted(value) if isinstance(value, list) else value)


def _metrics(llm: "LLM", prompts: list[list[int]]) -> dict[str, Any]:
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


ASK = {"generate": _generate, "see": _see, "embed": _embed, "reload": _reload, "methods": _methods, "metrics": _metrics}


def main(jobs: str, out: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    _inspect_in_this_process()
    results = []
    for job in json.loads(Path(jobs).read_text()):
        results.append(_run(job))
        gc.collect()
        cleanup_dist_env_and_memory()
    torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
