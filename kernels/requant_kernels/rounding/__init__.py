"""Weights -> codes on a grid, without data: what calibrated quantizers build on and what a server does in flight."""
