"""Training what quantization left free (rounding, ranges, sparse values), by block and through the whole model."""
