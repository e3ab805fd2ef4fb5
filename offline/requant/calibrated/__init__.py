"""Calibrated quantization of a model in memory."""
