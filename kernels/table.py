"""The table of tensors that a launch works on, as the kernels read it: csrc/tensor_table.h and csrc/streams.h.

It is an int64 tensor on the device of shape (COLUMNS, tensors), by columns so that the search for a tensor reads
neighbours. A program takes a block of BLOCK elements of one tensor, in tiles of TILE.
"""

import triton
import triton.language as tl

TILE, BLOCK = tl.constexpr(1024), tl.constexpr(4096)  # elements; csrc/sums.h has them as kLanes and kBlock
MAX_EMA = 8

P, G, SLOT, EMA = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(5)  # addresses; 3 slots, 8 averages
KEEP, PRUNED = tl.constexpr(13), tl.constexpr(14)  # addresses of words of bits; 0: all kept, none pruned
N = tl.constexpr(15)  # elements
FIRST = tl.constexpr(16)  # of its blocks in the launch
IN_SUMS = tl.constexpr(17)  # and among those of all launches, for sums
INNER, PERIOD, FREEZE = tl.constexpr(18), tl.constexpr(19), tl.constexpr(20)  # of the mask: BitMask in csrc/streams.h
ALIGNED = tl.constexpr(21)  # whether every stream begins at a multiple of 16 bytes
SCALARS = tl.constexpr(22)  # its row of scalars
GROUP = tl.constexpr(23)  # its entry among the clip factors
COLUMNS = 24

# A row of scalars: those of the stages (pipeline.py), the weights of the averages, those of the rule.
WEIGHTS, RULE, WIDTH = tl.constexpr(9), tl.constexpr(17), tl.constexpr(25)


@triton.jit
def column(row, c):
    """A number of the table; row: (table, tensors, which of them)."""
    return tl.load(row[0] + c * row[1] + row[2])


@triton.jit
def find(table, tensors):
    """(the row of the tensor that this program's block belongs to, the number of that block within it)."""
    block = tl.program_id(0).to(tl.int64)
    low, high = block * 0, block * 0 + tensors
    while high - low > 1:
        middle = (low + high) // 2
        before = column((table, tensors, middle), FIRST) <= block
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    row = (table, tensors, low)
    return row, block - column(row, FIRST)


@triton.jit
def tiles(row, number):
    """(first element of the block, how many of its tiles are whole and aligned, how many there are)."""
    begin = number * BLOCK
    rest = tl.minimum(column(row, N) - begin, BLOCK).to(tl.int32)
    whole = tl.where(column(row, ALIGNED) != 0, rest // TILE, 0)
    return begin, whole, (rest + TILE - 1) // TILE


@triton.jit
def stream(row, c, dtype):
    return column(row, c).to(tl.pointer_type(dtype))


@triton.jit
def load(base, at, live):
    """A tile from element `at` on; live: which of its elements there are, None for all of an aligned one.

    A mask would keep the compiler from loading 16 bytes at a time, and without the promise of alignment it cannot.
    """
    if live is None:
        return tl.load(tl.multiple_of(base + at, 16) + tl.arange(0, TILE))
    else:
        return tl.load(base + at + tl.arange(0, TILE), mask=live, other=0)


@triton.jit
def store(base, at, live, x):
    if live is None:
        tl.store(tl.multiple_of(base + at, 16) + tl.arange(0, TILE), x)
    else:
        tl.store(base + at + tl.arange(0, TILE), x, mask=live)


@triton.jit
def alive(row, at):
    return tl.arange(0, TILE) < column(row, N) - at


# ---- bits --------------------------------------------------------------------------------------------


@triton.jit
def steps_over(rest, size, j):
    """(rest + j) // size for 0 <= rest < size and 0 <= j <= TILE, in 32 bits: dividing in 64 takes longer."""
    near = tl.minimum(size, 2 * TILE)  # a boundary further off than that is not reached
    return (tl.maximum(rest - (size - near), 0).to(tl.int32) + j) // near.to(tl.int32)


@triton.jit
def kept(row, at):
    """The bits of the mask of a tile: element i has bit (i // inner) % period."""
    words = stream(row, KEEP, tl.int32)
    inner, period = column(row, INNER), column(row, PERIOD)
    first = at // inner % period
    ahead = steps_over(at % inner, inner, tl.arange(0, TILE))
    bit = first + ahead - period * steps_over(first, period, ahead)
    word = tl.load(words + (bit >> 5), mask=column(row, KEEP) != 0, other=-1)
    return (word >> (bit & 31).to(tl.int32)) & 1 != 0


@triton.jit
def bits(words, at, live):
    """One bit an element of a tile, from words that begin with the tensor."""
    j = tl.arange(0, TILE)
    word = tl.load(words + at // 32 + j // 32, mask=live, other=0)
    return (word >> (j & 31)) & 1 != 0


@triton.jit
def set_bits(words, at, live, new):
    """Sets the bits where `new`: at most those that are alive. A tile has its words to itself."""
    live_words = tl.max(tl.reshape(live.to(tl.int32), [TILE // 32, 32]), axis=1) != 0
    own = tl.sum(tl.reshape((new & live).to(tl.int32), [TILE // 32, 32]) << tl.arange(0, 32)[None, :], axis=1)
    w = words + at // 32 + tl.arange(0, TILE // 32)
    tl.store(w, tl.load(w, mask=live_words, other=0) | own, mask=live_words)
