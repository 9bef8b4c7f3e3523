# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `irpe_ops.backends.triton`.

`spread_kernel` turns encodings into values for pairs of tokens, and `sum_kernel` sums values of pairs by bucket. Both
take one token at a time, whose ids are the same in every (batch, head), called a plane; the sums are a product with a
matrix of zeros and ones, on the tensor cores. Between them is ordinary attention with values added to its scores:
`forward_kernel`, and for the gradients `delta_kernel`, `key_gradient_kernel`, which also keeps the gradients of all
scores, and `query_gradient_kernel`. No atomics: each program owns what it writes, and adds in a fixed order.

Pairs are stored as ``(planes, length, row)`` for a chunk of planes, with rows padded to a multiple of 8. Names in
capitals are compile-time constants. BLOCK_M queries meet BLOCK_N keys; D is padded to a power of two, HEAD.
PARTS is 2 for ``cross`` (rows and columns: two maps, two lookups side by side), else 1. A lookup has PADDED columns per
part, a multiple of 8, so that its rows start at multiples of 16 bytes; COLUMNS, a power of two, holds all parts.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Triton would recompile whenever one of these is 1 or a multiple of 16: too often if images have many sizes.
SIZES = ["heads", "length", "height", "width", "skip", "table_size", "batch_stride", "head_stride", "mask_batch",
         "mask_head", "mask_query", "mask_key", "first", "planes", "row", "drop_below"]  # fmt: skip


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter's bfloat16 product is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_transposed(scores, tile, SIZE: tl.constexpr, INTERPRETED: tl.constexpr):
    """scores + trans(tile), exact: a product with the identity, because tensor cores can read a tile transposed."""
    if INTERPRETED:
        return scores + tl.trans(tile).to(tl.float32)
    places = tl.arange(0, SIZE)
    unit = tl.where(places[:, None] == places[None, :], 1.0, 0.0)
    return tl.dot(unit.to(tile.dtype), tl.trans(tile), scores, input_precision="ieee")


@triton.jit
def positions(tokens, length, height, width, skip):
    """Two positions per token, as query and as key: their difference is a pair's place in the table of offsets.

    Leading tokens are placed so far outside the grid that every pair with one falls into the last part of the table.
    """
    place = tl.minimum(tokens, length - 1) - skip
    on_grid = place // width * (2 * width - 1) + place % width
    span = (height - 1) * (2 * width - 1) + width - 1
    as_query = tl.where(place < 0, 2 * span + 1, on_grid) + span
    as_key = tl.where(place < 0, -span - 1, on_grid)
    return as_query, as_key


@triton.jit
def ids_of(token, others, offset_table, length, height, width, skip, table_size, PARTS: tl.constexpr):
    """The buckets of one token paired with the others, in each of the one or two maps."""
    as_query, unused_key = positions(token, length, height, width, skip)
    unused_query, as_key = positions(others, length, height, width, skip)
    pair = offset_table + (as_query - as_key)
    first = tl.load(pair).to(tl.int32)
    if PARTS == 2:
        return first, tl.load(pair + table_size).to(tl.int32)
    return first, first


@triton.jit
def bucket_row(plane, token, heads, batch_stride, head_stride, row_stride):
    """Where the row of a token starts in each plane of a (B, H, L, N) tensor."""
    place = (plane // heads).to(tl.int64) * batch_stride + (plane % heads).to(tl.int64) * head_stride
    return (place + token.to(tl.int64) * row_stride) // 8 * 8  # unchanged, but now the compiler knows it is a multiple


@triton.jit
def load_rows(pointer, rows, row_stride, count, COLUMNS: tl.constexpr, USED: tl.constexpr):
    """(rows, COLUMNS) of a matrix whose columns are adjacent; zero beyond `count` rows and USED columns."""
    columns = tl.arange(0, COLUMNS)
    where = rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    return tl.load(pointer + where, mask=(rows[:, None] < count) & (columns[None, :] < USED), other=0.0)


@triton.jit
def store_rows(pointer, rows, row_stride, count, values, COLUMNS: tl.constexpr, USED: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    where = rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    mask = (rows[:, None] < count) & (columns[None, :] < USED)
    tl.store(pointer + where, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_pairs(pairs, local, tokens, others, length, row):
    """(tokens, others) of the chunk's plane `local`; zero outside."""
    row = row // 8 * 8  # unchanged, but now the compiler knows it is a multiple
    pairs += tl.multiple_of(local.to(tl.int64) * length * row, 8)
    mask = (tokens < length)[:, None] & (others < row)[None, :]
    return tl.load(pairs + (tokens[:, None] * row + others[None, :]), mask=mask, other=0.0)


@triton.jit
def store_pairs(pairs, local, tokens, others, length, row, values):
    row = row // 8 * 8
    pairs += tl.multiple_of(local.to(tl.int64) * length * row, 8)
    mask = (tokens < length)[:, None] & (others < row)[None, :]
    tl.store(pairs + (tokens[:, None] * row + others[None, :]), values.to(pairs.dtype.element_ty), mask=mask)


@triton.jit
def keep_mask(
    seed_pointer, plane, queries, first_key, length, drop_below, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(queries, keys) bool, False with probability `drop_below` / 65,536: a function of the seed and the element alone.

    Philox makes four words at a time: 16 bits for each of eight neighbouring keys. Seven rounds pass every test of
    BigCrush (Salmon et al., SC 2011).
    """
    eights = first_key // 8 + tl.arange(0, BLOCK_N // 8)
    element = queries[:, None] * tl.cdiv(length, 8) + eights[None, :]
    zero = element * 0
    a, b, c, d = tl.philox(tl.load(seed_pointer), element, zero + plane, zero, zero, 7)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # a, b, c, d of the first eight, ...
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK_M, BLOCK_N])
    return bits.to(tl.int32) >= drop_below


@triton.jit
def scores_of(
    q_tile, k_tile, queries, keys, pairs_k, pairs_q, padding, mask, mask_query, mask_key, local, length, row, scale,
    ON_K: tl.constexpr, ON_Q: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(queries, keys) scores of a tile, base 2, with encodings and masks."""
    scores = dot(q_tile, tl.trans(k_tile), PRECISION, INTERPRETED) * scale
    if ON_K:
        scores += load_pairs(pairs_k, local, queries, keys, length, row).to(tl.float32)
    if ON_Q:
        scores = add_transposed(scores, load_pairs(pairs_q, local, keys, queries, length, row), BLOCK_M, INTERPRETED)
    scores = scores * LOG2_E
    inside = (queries < length)[:, None] & (keys < length)[None, :]
    if MASK != "none":
        where = queries[:, None].to(tl.int64) * mask_query + keys[None, :].to(tl.int64) * mask_key
        if MASK == "bool":
            scores = tl.where(tl.load(mask + where, mask=inside, other=1) != 0, float("-inf"), scores)
        else:
            scores += tl.load(mask + where, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    if PADDING:
        ignored = tl.load(padding + keys, mask=keys < length, other=1) != 0
        scores = tl.where(ignored[None, :], float("-inf"), scores)
    return tl.where((keys < length)[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def spread_kernel(
    lookup, offset_table, pairs, batch_stride, head_stride, row_stride,
    heads, length, height, width, skip, table_size, first, planes, row,
    PARTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """pairs[p, i, j] = lookup[first + p, i, id(i, j)] for one token i, BLOCK_N tokens j, and BLOCK_P planes.

    A row of lookups is one or two L1 cache lines, shared by neighbouring threads.
    """
    token, local = tl.program_id(0), tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    others = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_ids, second_ids = ids_of(token, others, offset_table, length, height, width, skip, table_size, PARTS)
    source = lookup + bucket_row(first + local, token, heads, batch_stride, head_stride, row_stride)[:, None]
    row = row // 8 * 8
    mask = (local < planes)[:, None] & (others < row)[None, :]
    found = tl.load(source + first_ids[None, :], mask=mask)
    if PARTS == 2:
        found = found.to(tl.float32) + tl.load(source + (second_ids + PADDED)[None, :], mask=mask).to(tl.float32)
    pairs += (local.to(tl.int64) * length + token) * row
    tl.store(pairs[:, None] + others[None, :], found.to(pairs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def sum_kernel(
    pairs, peaks, log_sums, offset_table, sums, batch_stride, head_stride, row_stride,
    heads, length, height, width, skip, table_size, first, planes, row,
    RELATIVE: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sums[first + p, i, n]: the sum of pairs[p, i, j] over the j with id(i, j) == n, of one token i in BLOCK_P planes.

    RELATIVE values must still be multiplied by 2 ** (peak of their tile - log_sum).
    """
    token, local = tl.program_id(0), tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    plane, columns = first + local, tl.arange(0, COLUMNS)
    row = row // 8 * 8
    total = tl.zeros([BLOCK_P, COLUMNS], tl.float32)
    if RELATIVE:
        log_sum = tl.load(log_sums + plane.to(tl.int64) * length + token, mask=local < planes, other=float("inf"))
        peaks += (local.to(tl.int64) * length + token) * tl.cdiv(length, BLOCK_N)
    pairs += (local.to(tl.int64) * length + token) * row
    for start in range(0, length, BLOCK_N):
        others = start + tl.arange(0, BLOCK_N)
        first_ids, second_ids = ids_of(token, others, offset_table, length, height, width, skip, table_size, PARTS)
        ones = columns[:, None] == first_ids[None, :]
        if PARTS == 2:
            ones = ones | (columns[:, None] == second_ids[None, :] + PADDED)
        mask = (local < planes)[:, None] & (others < row)[None, :]
        values = tl.load(pairs[:, None] + others[None, :], mask=mask, other=0.0)
        here = dot(values, tl.trans(tl.where(ones, 1.0, 0.0).to(values.dtype)), "ieee", INTERPRETED)
        if RELATIVE:
            peak = tl.load(peaks + start // BLOCK_N, mask=local < planes, other=0.0)
            here = here * tl.exp2(peak - log_sum)[:, None]
        total += here
    used = (local < planes)[:, None] & (columns < PARTS * PADDED)[None, :]
    place = bucket_row(plane, token, heads, batch_stride, head_stride, row_stride)
    tl.store(sums + place[:, None] + columns[None, :], total.to(sums.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, pairs_k, pairs_q, padding, mask, seed, out, kept, peaks, log_sums,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_query, mask_key,
    heads, length, first, row, scale, dropout_p, drop_below,
    ON_K: tl.constexpr, ON_Q: tl.constexpr, ON_V: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_M queries of one plane and runs over the keys with an online softmax (base 2)."""
    tiles = tl.cdiv(length, BLOCK_M)
    local = tl.program_id(0) // tiles
    plane = first + local
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    queries = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    mask += batch * mask_batch + head * mask_head
    padding += batch * length
    out += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    peaks += local.to(tl.int64) * length * tl.cdiv(length, BLOCK_N)
    log_sums += plane.to(tl.int64) * length

    q_tile = load_rows(q, queries, q_row, length, HEAD, HEAD_DIM)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, HEAD], tl.float32)

    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, keys, k_row, length, HEAD, HEAD_DIM)
        scores = scores_of(q_tile, k_tile, queries, keys, pairs_k, pairs_q, padding, mask, mask_query, mask_key, local,
                           length, row, scale, ON_K, ON_Q, PADDING, MASK, PRECISION, INTERPRETED,
                           BLOCK_M)  # fmt: skip
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A query that has seen no key yet has -inf here, and -inf - -inf is NaN.
        finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - finite)
        weights = tl.exp2(scores - finite[:, None])
        highest = new_highest
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            keep = keep_mask(seed, plane, queries, start, length, drop_below, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights * (1 / (1 - dropout_p)), 0.0)
        v_tile = load_rows(v, keys, v_row, length, HEAD, HEAD_DIM)
        result = result * shrink[:, None] + dot(weights.to(v_tile.dtype), v_tile, PRECISION, INTERPRETED)
        if ON_V:  # relative to the highest score so far, which `sum_kernel` needs
            store_pairs(kept, local, queries, keys, length, row, weights)
            peak = peaks + queries * tl.cdiv(length, BLOCK_N) + start // BLOCK_N
            tl.store(peak, highest, mask=queries < length)

    empty = total == 0.0  # all keys masked: the answer is zero, and so are its gradients
    divisor = tl.where(empty, 1.0, total)
    store_rows(out, queries, heads * HEAD_DIM, length, result / divisor[:, None], HEAD, HEAD_DIM)
    log_sum = tl.where(empty, float("inf"), highest + tl.log2(divisor))
    tl.store(log_sums + queries, log_sum, mask=queries < length)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    out, sums, grad_out, grad_sums, deltas, go_batch, go_head, go_row, gs_batch, gs_head, gs_row, heads, length,
    ON_V: tl.constexpr, ALL_PADDED: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """For each query, the sum of weights times their gradients, which the gradient of softmax subtracts."""
    tiles = tl.cdiv(length, BLOCK_M)
    plane = tl.program_id(0) // tiles
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    queries = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    out += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    grad_out += batch * go_batch + head * go_head
    grad = load_rows(grad_out, queries, go_row, length, HEAD, HEAD_DIM).to(tl.float32)
    delta = tl.sum(grad * load_rows(out, queries, heads * HEAD_DIM, length, HEAD, HEAD_DIM).to(tl.float32), 1)
    if ON_V:
        sums += batch * length * heads * ALL_PADDED + head * ALL_PADDED
        grad_sums += batch * gs_batch + head * gs_head
        grad = load_rows(grad_sums, queries, gs_row, length, COLUMNS, ALL_PADDED).to(tl.float32)
        delta += tl.sum(grad * load_rows(sums, queries, heads * ALL_PADDED, length, COLUMNS, ALL_PADDED), 1)
    tl.store(deltas + plane.to(tl.int64) * length + queries, delta, mask=queries < length)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    q, k, v, pairs_k, pairs_q, pairs_v, padding, mask, seed, log_sums, deltas, grad_out, kept, grad_k, grad_v,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch, mask_head, mask_query, mask_key,
    go_batch, go_head, go_row, heads, length, first, row, scale, dropout_p, drop_below,
    ON_K: tl.constexpr, ON_Q: tl.constexpr, ON_V: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_N keys and runs over the queries: gradients of k, v and, kept as pairs, of all scores.

    `kept` may be `pairs_k`, and gradients for keys replace `pairs_q`: the same program reads a place before writing it.
    """
    tiles = tl.cdiv(length, BLOCK_N)
    local = tl.program_id(0) // tiles
    plane = first + local
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    mask += batch * mask_batch + head * mask_head
    padding += batch * length
    grad_out += batch * go_batch + head * go_head
    grad_k += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    grad_v += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    log_sums += plane.to(tl.int64) * length
    deltas += plane.to(tl.int64) * length

    k_tile = load_rows(k, keys, k_row, length, HEAD, HEAD_DIM)
    v_tile = load_rows(v, keys, v_row, length, HEAD, HEAD_DIM)
    gk = tl.zeros([BLOCK_N, HEAD], tl.float32)
    gv = tl.zeros([BLOCK_N, HEAD], tl.float32)

    for start in range(0, length, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, queries, q_row, length, HEAD, HEAD_DIM)
        go_tile = load_rows(grad_out, queries, go_row, length, HEAD, HEAD_DIM)
        log_sum = tl.load(log_sums + queries, mask=queries < length, other=float("inf"))
        delta = tl.load(deltas + queries, mask=queries < length, other=0.0)
        scores = scores_of(q_tile, k_tile, queries, keys, pairs_k, pairs_q, padding, mask, mask_query, mask_key, local,
                           length, row, scale, ON_K, ON_Q, PADDING, MASK, PRECISION, INTERPRETED,
                           BLOCK_M)  # fmt: skip
        weights = tl.exp2(scores - log_sum[:, None])
        grad = dot(go_tile, tl.trans(v_tile), PRECISION, INTERPRETED)
        if ON_V:
            grad += load_pairs(pairs_v, local, queries, keys, length, row).to(tl.float32)
        dropped = weights
        if DROPOUT:
            keep = keep_mask(seed, plane, queries, first_key, length, drop_below, BLOCK_M, BLOCK_N)
            dropped = tl.where(keep, weights * (1 / (1 - dropout_p)), 0.0)
            grad = tl.where(keep, grad * (1 / (1 - dropout_p)), 0.0)
        gv += dot(tl.trans(dropped.to(go_tile.dtype)), go_tile, PRECISION, INTERPRETED)
        grad = (weights * (grad - delta[:, None])).to(q_tile.dtype)
        gk += dot(tl.trans(grad), q_tile, PRECISION, INTERPRETED)
        store_pairs(kept, local, queries, keys, length, row, grad)
        if ON_Q:
            store_pairs(pairs_q, local, keys, queries, length, row, tl.trans(grad))

    store_rows(grad_k, keys, heads * HEAD_DIM, length, gk * scale, HEAD, HEAD_DIM)
    store_rows(grad_v, keys, heads * HEAD_DIM, length, gv, HEAD, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    kept, k, grad_q, k_batch, k_head, k_row, heads, length, first, row, scale,
    HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The gradients of all scores, times the keys."""
    tiles = tl.cdiv(length, BLOCK_M)
    local = tl.program_id(0) // tiles
    batch, head = ((first + local) // heads).to(tl.int64), ((first + local) % heads).to(tl.int64)
    queries = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k += batch * k_batch + head * k_head
    grad_q += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    result = tl.zeros([BLOCK_M, HEAD], tl.float32)
    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, keys, k_row, length, HEAD, HEAD_DIM)
        grad = load_pairs(kept, local, queries, keys, length, row).to(k_tile.dtype)
        result += dot(grad, k_tile, PRECISION, INTERPRETED)
    store_rows(grad_q, queries, heads * HEAD_DIM, length, result * scale, HEAD, HEAD_DIM)
