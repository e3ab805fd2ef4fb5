"""Base quantizers: each module offers one pure ``quantize`` function of matrices, with no model plumbing."""
