"""W8A8 kernels in Triton.

table.py says which kernel runs at how many tokens, launch.py launches it: fused.py for few tokens, else rounding.py and
then product.py. steps.py is the arithmetic that they share. Only those four and launch.py import triton.
"""

from requant_kernels.w8a8.triton.implementation import Triton

IMPLEMENTATION = Triton()
