"""Models that are none of ours, random and small: bfloat16, GPTQ and AWQ."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.vllm_requant.checkpoints import random_model

GROUP = 64
CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}


def bystanders(folder: Path) -> dict[str, Path]:
    """Of each kind that vLLM serves here, one: on a CPU without AVX-512 its build has no operator for GPTQ and AWQ."""
    plain = random_model("llama", folder / "bfloat16")
    served = CONFIGS if torch.cuda.is_available() or torch.cpu._is_avx512_supported() else ()
    return {"bfloat16": plain} | {kind: _quantized(plain, folder / kind, kind) for kind in served}


def _quantized(source: Path, out: Path, kind: str) -> Path:
    """``source`` with random codes in every linear layer."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int32)

    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not layer.endswith("_proj"):
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        gptq = kind == "gptq"
        tensors[f"{layer}.qweight"] = words(columns // 8, rows) if gptq else words(columns, rows // 8)
        tensors[f"{layer}.qzeros"] = words(columns // GROUP, rows // 8)
        tensors[f"{layer}.scales"] = torch.full((columns // GROUP, rows), 0.01, dtype=torch.bfloat16)
        if gptq:
            tensors[f"{layer}.g_idx"] = torch.arange(columns, dtype=torch.int32) // GROUP
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[kind]}))
    return out
