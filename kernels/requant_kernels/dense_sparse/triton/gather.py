# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""The sparse part inside a kernel, summed up in a fixed order: slots (slots.py), then lists (lists.py). No atomics.

For empty slots the first column of x is read, and multiplied by zero: what is not finite makes all of y NaN, codes or
entries.
"""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton.decode import half_bits, half_number


@triton.jit
def deepest(further_ptr, first_strip, depth, S: tl.constexpr):
    """The steps of the deepest of S strips from ``first_strip`` on."""
    most = 0
    for s in tl.static_range(S):
        at = further_ptr + first_strip + s
        most = tl.maximum(most, tl.load(at + 1) - tl.load(at))
    return depth + most


@triton.jit
def locate_strips(further_ptr, strip, live, depth, strips):
    """Of strips ``strip``, a tensor or one, where step 0 stands, where it would stand if all steps were further ones,
    and how many steps there are: none unless ``live``."""
    further = tl.load(further_ptr + strip)
    steps = depth + tl.load(further_ptr + strip + 1) - further
    return strip * depth, (strips - 1) * depth + further, tl.where(live, steps, 0)


@triton.jit
def fetch_slots(slots_ptr, places, step, depth, stride, Q: tl.constexpr):
    """Q steps of L strips, every ``stride``-th from ``step`` on, zero behind the last: a tuple of int32 [32 L], the
    lanes of one strip after those of the other. step, and ``places`` as ``locate_strips`` gives them, of each lane."""
    near, far, steps = places
    lane = tl.arange(0, step.shape[0]) % 32
    slots = ()
    for q in tl.static_range(Q):
        now = step + q * stride
        at = (tl.where(now < depth, near, far) + now) * 32 + lane
        slots = slots + (tl.load(slots_ptr + at, mask=now < steps, other=0),)  # noqa: RUF005
    return slots


@triton.jit
def fetch_near(at, step, steps, Q: tl.constexpr, FULL: tl.constexpr):
    """Q steps of L strips, near ones, from ``step`` on: as ``fetch_slots`` gives them. at int32* [32 L]: at the first.
    With FULL there are so many."""
    slots = ()
    for q in tl.static_range(Q):
        if FULL:
            slots = slots + (tl.load(at + 32 * q),)  # noqa: RUF005
        else:
            slots = slots + (tl.load(at + 32 * q, mask=step + q < steps, other=0),)  # noqa: RUF005
    return slots


@triton.jit
def gather_all(x_ptr, slots, Q: tl.constexpr):
    """x at the columns of ``slots`` as ``fetch_slots`` gives them: a tuple of DT [32 L]. x_ptr: one token."""
    gathered = ()
    for q in tl.static_range(Q):
        gathered = gathered + (tl.load(x_ptr + (slots[q] & 0xFFFF)),)  # noqa: RUF005
    return gathered


@triton.jit
def add_products(products, gathered, slots, Q: tl.constexpr, DT: tl.constexpr):
    """products fp32 [32 L] plus the gathered x times the values of ``slots``."""
    for q in tl.static_range(Q):
        products += gathered[q].to(tl.float32) * half_number(slots[q], 1, DT)
    return products


@triton.jit
def add_lanes(sums, products, owners):
    """sums fp32 [L, 16, 1] plus the products of each row's lanes. owners int32 [32 L]: ``Slots.owners``.

    On the tensor cores, in two parts that tf32 holds: 10 bits, and 10 more.
    """
    lanes = tl.reshape(products, (products.shape[0] // 32, 32, 1))
    owners = tl.reshape(owners, (products.shape[0] // 32, 1, 32)) & 15
    hit = tl.where(owners == tl.arange(0, 16)[None, :, None], 1.0, 0.0)
    high = (lanes.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    sums = tl.dot(hit, lanes - high, sums, input_precision="tf32")
    return tl.dot(hit, high, sums, input_precision="tf32")


@triton.jit
def most_chunks(bounds_ptr, first_list, S: tl.constexpr):
    """Of the S lists from ``first_list`` on, the number of chunks of the longest."""
    most = 0
    for s in tl.static_range(S):
        at = bounds_ptr + 2 * (first_list + s)
        most = tl.maximum(most, tl.load(at + 1) - tl.load(at))
    return most


@triton.jit
def multiply_lists(
    acc, most, x_ptr, entries_ptr, segments_ptr, bounds_ptr, lists, part, parts, DT: tl.constexpr,
):  # fmt: skip
    """acc fp32 [L, 16, 1] plus the products of x with every ``parts``-th chunk, from ``part`` [L] on, of ``lists`` [L],
    the longest of which has ``most`` chunks: 32 entries of 16 rows, told apart by a one-hot matrix."""
    bounds = bounds_ptr + 2 * lists
    chunk = tl.load(bounds) + part
    end = tl.load(bounds + 1)
    for _ in tl.range(0, tl.cdiv(most, parts), num_stages=1):
        live = chunk < end
        e = tl.load(entries_ptr + chunk[:, None] * 32 + tl.arange(0, 32)[None, :], mask=live[:, None], other=0)
        columns = tl.load(segments_ptr + chunk, mask=live, other=0)[:, None] + (e & 0xFFF)
        x = tl.load(x_ptr + columns, mask=(e >> 16) != 0, other=0.0)[:, :, None]
        hit = ((e >> 12) & 0xF)[:, None, :] == tl.arange(0, 16)[None, :, None]
        acc = tl.dot(tl.where(hit, half_bits(e, 1, DT)[:, None, :], 0.0).to(DT), x, acc)
        chunk += parts
    return acc
