"""Parts of ``benchmarks/soak.py``: clients, their coming and going, probes, memory, the verdict."""
