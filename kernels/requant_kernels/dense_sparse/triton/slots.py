"""Where most entries of the sparse part stand for one token: in lanes of their rows, so that the place says the row.

Slots. A strip of 16 rows has 32 lanes, and its rows share them out, each the more the more entries it has. Entry j of a
row, from left to right, stands in lane j modulo their number, one *step* deeper each time that they are all
used. An entry is its column in bits 0-15 and the value's 16 bits above; an empty slot is zero. A kernel adds up a
lane's products in place.

Every strip has ``depth`` steps, so that a kernel knows where they are without looking: int32 [strips, depth, 32]. That
is as many as any of them needs, where none needs much more than the mean, else as many as a third can do with. The
others' *further* steps stand behind all of these, one strip's after the other's, where ``further`` says. What a strip
crowded beyond all measure does not hold is left to lists.py, and so is all of a layer whose columns do not fit 16 bits.
"""

from dataclasses import dataclass

import torch

from requant_kernels.dense_sparse.triton.lists import offsets_of
from requant_kernels.dense_sparse.triton.strips import STRIP, upper_half
from requant_kernels.sparse import MAX_UINT16_COLUMNS, SparsePart

LANES = 32
SPARE_STEPS = 32  # kernels may read, never use, as many steps behind the last one
LAST = 512  # in ``Slots.owners``
# No strip has more steps than these times the mean, and these: the rest have finished long before.
DEEPEST, SHALLOW = 4, 8
# Nor are all as deep as the deepest, unless that has no more than these times the mean, and these.
EVEN, AND = 1.25, 2


@dataclass(frozen=True)
class Slots:
    """slots int32 [strips and more, depth, 32], further steps behind those of the strips; further int32 [strips + 1]:
    where the further steps of each strip begin, counted from the first; owners int32 [strips, 32]: the row, of the
    strip's 16, that a lane belongs to, 16 times the number of lanes before it that do, and LAST where none behind it
    does; ``rest``: the entries that have no slot, None where there are none."""

    slots: torch.Tensor
    further: torch.Tensor
    owners: torch.Tensor
    rest: SparsePart | None

    @property
    def depth(self) -> int:
        return self.slots.shape[1]

    @property
    def deepened(self) -> bool:
        """Whether any strip has further steps."""
        return bool(self.further[-1])


def choose_lanes(counts: torch.Tensor) -> torch.Tensor:
    """Each row's number of lanes, int64 [strips, 16]; counts int64 [strips, 16]: its entries. The deepest row of a
    strip gets one more as long as there are some."""
    lanes = torch.ones_like(counts)
    for _ in range(LANES - STRIP):
        load = counts / lanes
        deepest = load.argmax(1, keepdim=True)
        lanes.scatter_add_(1, deepest, (load.gather(1, deepest) > 1).long())
    return lanes


def needed_steps(counts: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
    """The steps of each strip, int64 [strips], bounded; counts and lanes int64 [strips, 16]: the entries of each row,
    and ``choose_lanes``."""
    steps = (-(-counts // lanes)).amax(1)
    return steps.clamp(max=DEEPEST * -(-int(steps.sum()) // len(steps)) + SHALLOW)


def choose_depth(steps: torch.Tensor) -> int:
    """The steps that every strip has; ``steps`` int64 [strips] are what each needs."""
    most = int(steps.max())
    even = most <= EVEN * float(steps.float().mean()) + AND
    return max(1, most if even else int(steps.sort().values[len(steps) // 3]))


def build_slots(sparse: SparsePart, strips: int) -> Slots | None:
    """``sparse``, at least one entry, whose values are bfloat16 or float16, of a layer of ``strips`` strips, on its
    device; None where columns do not fit."""
    if sparse.in_features > MAX_UINT16_COLUMNS:
        return None
    rows, device = sparse.rows().long(), sparse.values.device
    within = torch.arange(sparse.nnz, device=device) - sparse.row_offsets[rows]
    counts = torch.bincount(rows, minlength=strips * STRIP).view(strips, STRIP)
    lanes = choose_lanes(counts)
    first = lanes.cumsum(1) - lanes
    steps = needed_steps(counts, lanes)
    depth = choose_depth(steps)
    further = offsets_of((steps - depth).clamp(min=0))
    behind = -(-(int(further[-1]) + SPARE_STEPS) // depth)
    slots = torch.zeros(strips + behind, depth, LANES, dtype=torch.int32, device=device)
    strip, count = rows // STRIP, lanes.view(-1)[rows]
    step, lane = within // count, first.view(-1)[rows] + within % count
    has = step < steps[strip]
    place = torch.where(step < depth, strip * depth, (strips - 1) * depth + further[strip]) + step
    words = upper_half(sparse.values) | sparse.columns.to(torch.int32)
    slots.view(-1)[(place * LANES + lane)[has]] = words[has]
    # lanes that no row has are empty: whose they are does not matter
    lane = torch.arange(LANES, device=device)
    row = (lane >= first[:, :, None]).sum(1) - 1
    before = lane - first.gather(1, row)
    owners = row + STRIP * before
    owners[:, :-1] += LAST * (before[:, 1:] == 0)
    owners[:, -1] += LAST
    rest = None
    if not bool(has.all()):
        shape = (sparse.out_features, sparse.in_features)
        rest = SparsePart.from_coo(rows[~has], sparse.columns[~has].long(), sparse.values[~has], shape)
    return Slots(slots, further.to(torch.int32), owners.to(torch.int32), rest)
