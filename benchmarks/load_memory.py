"""What loading a checkpoint needs in memory, by format, against its size on disk.

    python benchmarks/load_memory.py [--layers 12] [--hidden 2048]

A Llama-shaped model of random weights is quantized in several ways, and each is loaded by vLLM (eager, this machine's
device) in a process of its own. Memory is anonymous: what the process has to have, without the mapped files. "Loaded"
is that of the engine when it is ready, less that of the unquantized model beyond its weights, which is vLLM's own;
"beyond" is how much more it was at its peak. One layer in both layouts is what a format may need beyond.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from requant import api
from requant.markdown import table
from requant.recipe import load_recipe
from requant.server import QUIET_ENVIRONMENT

from benchmarks.anonymous import Peak, anonymous_bytes
from benchmarks.random_model import make_model

RECIPES = {"W4 + 0.5 % sparse": "w4-sparse", "W8A8": "rtn-w8a8"}
MIB = 2**20
CACHE = 8 * MIB  # of keys and values: so small that the most memory is that of loading


@dataclass(frozen=True)
class Loaded:
    """Bytes of anonymous memory: when the engine was ready, and the most until then."""

    ready: int
    peak: int


def load(model: Path) -> Loaded:
    from vllm import LLM

    with Peak() as peak:
        engine = LLM(
            str(model),
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=1,
            kv_cache_memory_bytes=CACHE,
        )
        ready = anonymous_bytes()
    del engine
    return Loaded(ready, peak.most)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    arguments = parser.parse_args()
    # the engine in the process that watches; and glibc gives freed tensors back at once, or they would count
    os.environ |= QUIET_ENVIRONMENT | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "MALLOC_MMAP_THRESHOLD_": str(MIB // 4),
    }
    with tempfile.TemporaryDirectory() as place:
        models = {"bfloat16": Path(place) / "model"}
        make_model(models["bfloat16"], arguments.layers, arguments.hidden)
        for number, (name, recipe) in enumerate(RECIPES.items()):
            models[name] = Path(place) / str(number)
            api.quantize(models["bfloat16"], models[name], load_recipe(recipe))
        rows, own = [], 0
        for name, folder in models.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(load, folder).result()
            own = own or found.ready - size_of(folder)
            figures = (size_of(folder), found.ready - own, found.peak - found.ready)
            rows.append((name, *(f"{figure / MIB:.0f}" for figure in figures)))
    print(table(("format", "on disk, MiB", "loaded, MiB", "beyond, MiB"), rows))


if __name__ == "__main__":
    main()
