"""The k largest entries of every row and their order, by bisection on the bits of the numbers.

Shapes: B rows, P entries, k chosen ones. Among equal entries the lowest index comes first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16_384  # entries that one program holds in registers
WARPS = 8


@triton.jit
def _sort_key(x):
    """Integers in the order of the numbers: the sign bit turns the other bits of a negative number around."""
    x = x + 0.0  # -0 and 0 are equal
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        return bits ^ ((bits >> 15) & 0x7FFF)


@triton.jit
def _count_bits(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF


@triton.jit
def _write_bits(word, out, first, limit, W: tl.constexpr):
    """Write the first `limit` set bits of W words, in order, as indices."""
    count = _count_bits(word)
    place = tl.cumsum(count, 0) - count
    count = tl.where(place < limit, count, 0)
    column = first + tl.arange(0, W) * 32
    for _ in range(0, tl.max(count, 0)):  # as often as the fullest word has bits
        tl.store(out + place, column + _count_bits((word & (-word)) - 1), mask=(count > 0) & (place < limit))
        word = word & (word - 1)
        place += 1
        count -= 1


@triton.jit
def _kth_largest(key, k, BITS: tl.constexpr):
    """The k-th largest of at least k integers of BITS bits, from the top.

    Of up to 512 keys two bits at a time: the numbers of keys from each of three trials up are added as one integer of
    three fields, because a sum over the block waits for all of its threads, whatever it adds.
    """
    cut = tl.full((), -(1 << (BITS - 1)), tl.int32)
    if key.shape[0] <= 512:
        for pair in tl.static_range(BITS // 2):
            one = cut + (1 << (BITS - 2 - 2 * pair))
            two = one + (1 << (BITS - 2 - 2 * pair))
            three = two + (1 << (BITS - 2 - 2 * pair))
            fields = (key >= one).to(tl.int32) + ((key >= two).to(tl.int32) << 10)
            counts = tl.sum(fields + ((key >= three).to(tl.int32) << 20), 0)
            cut = tl.where((counts & 1023) >= k, one, cut)
            cut = tl.where(((counts >> 10) & 1023) >= k, two, cut)
            cut = tl.where((counts >> 20) >= k, three, cut)
    else:
        for bit in tl.static_range(BITS):
            if bit == 0:
                trial = cut * 0
            else:
                trial = cut + (1 << (BITS - 1 - bit))
            cut = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= k, trial, cut)
    return cut


@triton.jit
def _select_kernel(
    value, words, code_sum, threshold, P, size, n_chunks, k,
    PB: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr, LEAKY: tl.constexpr, SUM: tl.constexpr,
    FEW_GROUPS: tl.constexpr,
):  # fmt: skip
    """Two sets of entries of one chunk of a row, as bits: those above some level, fewer than SLOTS, and those at it.

    All above the level and, if those are fewer than k, the first at the level hold the k largest. The k-th largest of
    the maxima of groups of 32 entries is at most the k-th largest entry, and usually not far from it, so that the
    search runs over a 32nd of the entries.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    W: tl.constexpr = PB // 32
    bit = tl.arange(0, 32)[None, :]
    place = tl.arange(0, W)[:, None] * 32 + bit
    inside = (place < size) & (chunk * size + place < P)
    code = tl.load(value + row * P + chunk * size + place, mask=inside, other=float("-inf"))
    if LEAKY:
        code = tl.where(code.to(tl.float32) >= tl.load(threshold), code, 0.0).to(code.dtype)
    if SUM:
        positive = tl.where(inside & (code.to(tl.float32) > 0), code, 0.0).to(tl.float32)
        tl.store(code_sum + row * n_chunks + chunk, tl.sum(tl.sum(positive, 1), 0))
    LOWEST: tl.constexpr = -(1 << (BITS - 1))
    key = tl.where(inside, _sort_key(code), LOWEST)
    if FEW_GROUPS:
        cut = _kth_largest(tl.reshape(key, (PB,)), k, BITS)
    else:
        cut = _kth_largest(tl.max(key, 1), k, BITS)
    above = tl.sum((key > cut).to(tl.int32) << bit, 1)
    n_above = tl.sum(_count_bits(above), 0)
    if n_above > SLOTS - k:  # rare: large entries crowd into few groups
        cut = _kth_largest(tl.reshape(key, (PB,)), k, BITS)
        above = tl.sum((key > cut).to(tl.int32) << bit, 1)
        n_above = tl.sum(_count_bits(above), 0)
    level = tl.sum((key == cut).to(tl.int32) << bit, 1)
    at = words + (row * n_chunks + chunk) * 2 * W + tl.arange(0, W)
    tl.store(at, above)
    tl.store(at + W, level)


@triton.jit
def _list_kernel(words, candidate, candidates, size, n_chunks, k, W: tl.constexpr, SLOTS: tl.constexpr):
    """List the two sets, at least k entries in all. One warp: nothing waits at a barrier."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = words + (row * n_chunks + chunk) * 2 * W + tl.arange(0, W)
    above, level = tl.load(at), tl.load(at + W)
    n_above = tl.sum(_count_bits(above), 0)
    n_level = tl.maximum(k - n_above, 0)
    out = candidate + (row * n_chunks + chunk) * SLOTS
    _write_bits(above, out, chunk * size, n_above, W)
    _write_bits(level, out + n_above, chunk * size, n_level, W)
    tl.store(candidates + row * n_chunks + chunk, n_above + n_level)


@triton.jit
def _code_key(value, threshold, LEAKY: tl.constexpr):
    code = value.to(tl.float32)
    if LEAKY:
        code = tl.where(code >= tl.load(threshold), code, 0.0)
    return _sort_key(code)


@triton.jit
def _merge_kernel(
    value, candidate, candidates, out_index, out_value, threshold, P, n_chunks, k,
    NB: tl.constexpr, SLOTS: tl.constexpr, LEAKY: tl.constexpr,
):  # fmt: skip
    """The k largest candidates of all chunks of a row, largest first; equal ones come in the order of their indices."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, NB)
    chunk = i // SLOTS
    real = i < n_chunks * SLOTS
    real = real & (i % SLOTS < tl.load(candidates + row * n_chunks + chunk, mask=real, other=0))
    index = tl.load(candidate + row * n_chunks * SLOTS + i, mask=real, other=0)
    mine = tl.load(value + row * P + index, mask=real, other=0.0)
    key = _code_key(mine, threshold, LEAKY)
    place = tl.zeros((NB,), tl.int32)
    for other_chunk in range(0, n_chunks):
        for slot in range(0, tl.load(candidates + row * n_chunks + other_chunk)):
            at = other_chunk * SLOTS + slot
            other_index = tl.load(candidate + row * n_chunks * SLOTS + at)
            other = _code_key(tl.load(value + row * P + other_index), threshold, LEAKY)
            place += ((other > key) | ((other == key) & (at < i))).to(tl.int32)
    kept = real & (place < k)
    tl.store(out_value + row * k + place, mine.to(tl.float32), mask=kept)
    tl.store(out_index + row * k + place, index.to(tl.int64), mask=kept)


def select(value_BP: Tensor, k: int, threshold: Tensor | None, want_sum: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Indices int64 [B, k] and entries float32 [B, k], largest first, and the sum of each row's codes [B].

    With a threshold (a tensor of one number) the choice is among codes: the entry from the threshold up, 0 below it.
    Without one, the summed codes are the positive entries.
    """
    B, P = value_BP.shape
    value_BP, device = value_BP.contiguous(), value_BP.device
    n_chunks = max(1, min(triton.cdiv(P, CHUNK), P // max(1, k)))
    size = triton.cdiv(P, n_chunks)  # chunks of equal size, each of at least k entries
    PB = max(32, triton.next_power_of_2(size))
    slots = triton.next_power_of_2(3 * k)
    candidate = torch.empty(B, n_chunks, slots, dtype=torch.int32, device=device)
    candidates = torch.empty(B, n_chunks, dtype=torch.int32, device=device)
    sums = torch.empty(B, n_chunks, device=device) if want_sum else None
    index = torch.empty(B, k, dtype=torch.int64, device=device)
    value = torch.empty(B, k, device=device)
    if B:
        bits, leaky = 16 if value_BP.dtype == torch.bfloat16 else 32, threshold is not None
        words = torch.empty(B, n_chunks, 2, PB // 32, dtype=torch.int32, device=device)
        _select_kernel[(B, n_chunks)](
            value_BP, words, sums, threshold, P, size, n_chunks, k,
            PB=PB, SLOTS=slots, BITS=bits, LEAKY=leaky, SUM=want_sum, FEW_GROUPS=size // 32 < k,
            num_warps=WARPS if PB >= 8192 else 4 if PB >= 512 else 1,
        )  # fmt: skip
        _list_kernel[(B, n_chunks)](
            words, candidate, candidates, size, n_chunks, k, W=PB // 32, SLOTS=slots, num_warps=1
        )
        _merge_kernel[(B,)](
            value_BP, candidate, candidates, index, value, threshold, P, n_chunks, k,
            NB=triton.next_power_of_2(n_chunks * slots), SLOTS=slots, LEAKY=leaky, num_warps=1,
        )  # fmt: skip
    return index, value, None if sums is None else sums.sum(1)


@triton.jit
def _spread_kernel(logits, grad_sum, out, threshold, P, BLOCK: tl.constexpr, LEAKY: tl.constexpr):
    """Gradient of each row's summed codes."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(grad_sum + row)
    for first in range(0, P, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + row * P + column, mask=column < P, other=0.0).to(tl.float32)
        if LEAKY:
            on = (x >= tl.load(threshold)) & (x > 0)
        else:
            on = x > 0
        tl.store(out + row * P + column, tl.where(on, g, 0.0), mask=column < P)


def spread(logits_BP: Tensor, grad_sum_B: Tensor, threshold: Tensor | None) -> Tensor:
    """Gradient [B, P] of the summed codes with respect to the entries."""
    B, P = logits_BP.shape
    out = torch.empty_like(logits_BP)
    block = min(4096, triton.next_power_of_2(P))
    if B:
        _spread_kernel[(B,)](logits_BP, grad_sum_B.contiguous(), out, threshold, P, BLOCK=block,
                             LEAKY=threshold is not None, num_warps=8)  # fmt: skip
    return out
