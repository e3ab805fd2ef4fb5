"""Parts of ``benchmarks/kernels.py``: what is measured, how, and what becomes of it. Needs torch and triton >= 3.6."""
