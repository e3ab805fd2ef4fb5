"""Dense-plus-sparse kernels in Triton.

The walk of a layer: strips.py, slots.py, windows.py, lists.py and leftovers.py lay it out at load time (layer.py ties
them together), table.py says which kernel runs at how many tokens, launch.py launches it: few.py, middle.py or many.py,
with the helpers decode.py, gather.py (few), patch.py (middle), finish.py and fixup.py. Only those last eight, and
launch.py, import triton.
"""

from requant_kernels.dense_sparse.triton.implementation import Triton

IMPLEMENTATION = Triton()
