"""Makes requant checkpoints: sensitivity, quantizers, the command line. torch, transformers, safetensors; never vllm."""
