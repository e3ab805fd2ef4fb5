"""Runs vLLM engines, one after the other, in a process of their own: `python -m tests.vllm_requant.engine JOBS OUT`.

A job is {"model": folder, "prompts": [[token, ...], ...], **arguments of vllm.LLM}. Its result is either
{"logprobs": [[tokens-1, vocabulary] per prompt], "generated": [[token, ...] per prompt]} or {"error": text}.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

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


def run_jobs(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The results of ``jobs``, in order; engines of one rank run inside one process, which saves their start-up."""
    folder.mkdir()
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    parallel = any(_processes(job) > 1 for job in jobs)
    settings = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(parallel))}
    command = [sys.executable, "-m", "tests.vllm_requant.engine", str(folder / "jobs.json"), str(folder / "results.pt")]
    done = subprocess.run(command, cwd=ROOT, env=settings, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    (folder / "log").write_text(done.stdout + done.stderr)
    return torch.load(folder / "results.pt")


def _processes(job: dict[str, Any]) -> int:
    return job.get("tensor_parallel_size", 1) * job.get("pipeline_parallel_size", 1)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    prompts = job.pop("prompts", [])
    backend = "mp" if _processes(job) > 1 else "uni"
    try:
        llm = LLM(**COMMON | {"distributed_executor_backend": backend} | job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    sampling = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=-1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    result = {
        "logprobs": [
            torch.tensor([[entry[token].logprob for token in range(len(entry))] for entry in out.prompt_logprobs[1:]])
            for out in outputs
        ],
        "generated": [list(out.outputs[0].token_ids) for out in outputs],
    }
    llm.llm_engine.engine_core.shutdown()
    return result


def main(jobs: str, out: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    results = []
    for job in json.loads(Path(jobs).read_text()):
        results.append(_run(job))
        gc.collect()
        cleanup_dist_env_and_memory()
    torch.save(results, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
