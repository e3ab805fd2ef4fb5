"""What quantization by a recipe costs in perplexity, bits, time and memory: shared by the benchmarks of methods."""
