"""What a quantized linear layer is and how it runs: torch, and triton on a GPU; never vllm, never transformers."""
