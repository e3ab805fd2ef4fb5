"""Parts of ``benchmarks/kernels.py``: shapes, layers, clocks, tables, tuning. Needs torch and triton >= 3.6 only."""
