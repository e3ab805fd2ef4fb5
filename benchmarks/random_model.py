"""A Llama of random weights and of any size, with the small tokenizer of tests/fixtures/micro-llama-en.

    python benchmarks/random_model.py OUT [--layers 16] [--hidden 2048]

By default it has the layers of Llama-3.2-1B, though not its vocabulary. What it says means nothing; what it costs to
serve is that of a trained model of this shape.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "micro-llama-en"
HEAD = 64  # columns


def make_model(folder: Path, layers: int, hidden: int) -> None:
    """Writes it in bfloat16; ``folder`` must not exist."""
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LlamaConfig.from_pretrained(TOKENIZER).vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there already")
    make_model(arguments.out, arguments.layers, arguments.hidden)


if __name__ == "__main__":
    main()
