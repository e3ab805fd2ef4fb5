"""AWEQ (arXiv 2311.01305): equalization of activations and weights, int8 inputs, bias correction."""
