"""How long a launch takes by its machine code, without a GPU: the schedulers of one multiprocessor, cycle by cycle.

Ours. The compiler says in each instruction how many cycles later the warp may go on, and which of six scoreboards it
has to wait for; what it can not know, the memories' latencies and rates and how warps share the units, is the model's.
"""
