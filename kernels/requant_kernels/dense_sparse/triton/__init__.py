"""Dense-plus-sparse kernels in Triton.

The walk of a layer: strips.py, patches.py, slots.py and lists.py lay it out at load time (layer.py ties them together),
table.py says which kernel runs at how many tokens, launch.py launches it: one.py, middle.py or many.py, with the
helpers digits.py, gather.py and rows.py (one), decode.py, patch.py (middle, many), finish.py and fixup.py. Only those
last ten, and launch.py, import triton.
"""

from requant_kernels.dense_sparse.triton.implementation import Triton

IMPLEMENTATION = Triton()
