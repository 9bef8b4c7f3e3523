# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `irpe_ops.backends.triton`: forward, gradients by query and by key tiles, sums by bucket.

Scores of a tile are ``q k^T * scale + lookup_k[i, id(i, j)] + lookup_q[j, id(j, i)]``. An id depends on the offset of
two tokens alone, so it is read from a table of all offsets (a few KB, in L1) at the difference of two numbers, one a
token. No atomics: each program owns its rows of whatever it writes, and adds in a fixed order. What is summed by bucket
is kept for a chunk of tokens at a time, so that memory does not grow with L squared.

Names in capitals are constants of a compiled kernel. BLOCK_M queries meet BLOCK_N keys; D and N are padded to powers of
two, HEAD and COLUMNS. PARTS is 2 for ``cross`` (rows and columns: two maps, two lookups side by side), else 1. A lookup
has PADDED columns a part, a multiple of 8, so that its rows start at multiples of 16 bytes.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Triton would compile anew for each of these that is 1, or a multiple of 16: too often where images have many sizes.
SIZES = ["heads", "length", "height", "width", "skip", "table_size", "lk_batch", "lk_head", "lq_batch", "lq_head",
         "mask_batch", "mask_head", "mask_query", "mask_key", "first", "rows", "kept_row",
         "planes"]  # fmt: skip


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter's bfloat16 product is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def positions(tokens, length, height, width, skip):
    """Two numbers a token, as query and as key: their difference is the place of a pair in the table of offsets.

    Leading tokens stand so far outside the grid that every pair with one of them falls into the table's last part.
    """
    place = tl.minimum(tokens, length - 1) - skip
    on_grid = place // width * (2 * width - 1) + place % width
    span = (height - 1) * (2 * width - 1) + width - 1
    as_query = tl.where(place < 0, 2 * span + 1, on_grid) + span
    as_key = tl.where(place < 0, -span - 1, on_grid)
    return as_query, as_key


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
def load_parts(pointer, rows, row_stride, count, COLUMNS: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
               NEEDED: tl.constexpr):  # fmt: skip
    """Lookups, or sums, of the one map or the two; nothing is read unless it is needed."""
    first = load_rows(pointer, rows, row_stride, count, COLUMNS, PADDED if NEEDED else 0)
    if PARTS == 2:
        return first, load_rows(pointer + PADDED, rows, row_stride, count, COLUMNS, PADDED if NEEDED else 0)
    return first, first


@triton.jit
def keep_rows(pointer, plane, tokens, first, rows, row_stride, others, values):
    """Into (planes, rows, row_stride), for the sums by bucket: `rows` tokens from `first` on, and every other token."""
    row_stride = row_stride // 8 * 8  # as it is; the compiler learns that it is a multiple
    pointer += tl.multiple_of(plane.to(tl.int64) * rows * row_stride, 8)
    where = (tokens - first)[:, None] * row_stride + others[None, :]
    mask = (tokens < first + rows)[:, None] & (others < row_stride)[None, :]
    tl.store(pointer + where, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def pair_ids(offset_table, table_size, as_query, as_key, PARTS: tl.constexpr, NEEDED: tl.constexpr):
    """(queries, keys) bucket ids of the one map or the two; the compiler drops them unless they are needed."""
    if NEEDED:
        pair = offset_table + (as_query[:, None] - as_key[None, :])
        first = tl.load(pair).to(tl.int32)
        if PARTS == 2:
            return first, tl.load(pair + table_size).to(tl.int32)
        return first, first
    nothing = as_query[:, None] - as_key[None, :]
    return nothing, nothing


@triton.jit
def look_up(first, second, first_ids, second_ids, PARTS: tl.constexpr, INTERPRETED: tl.constexpr):
    """lookup[i, ids[i, j]] in fp32, summed over the maps."""
    if INTERPRETED:  # which cannot gather bfloat16; on a GPU half the registers are worth having
        first, second = first.to(tl.float32), second.to(tl.float32)
    found = tl.gather(first, first_ids, 1).to(tl.float32)
    if PARTS == 2:
        found += tl.gather(second, second_ids, 1).to(tl.float32)
    return found


@triton.jit
def encoded_scores(q_tile, k_tile, scale, lk0, lk1, ids0, ids1, lq0, lq1, back0, back1,
                   ON_K: tl.constexpr, ON_Q: tl.constexpr, PARTS: tl.constexpr,
                   PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    """(queries, keys) scores of a tile, before masks. `back` are the ids the other way round, (keys, queries)."""
    scores = dot(q_tile, tl.trans(k_tile), PRECISION, INTERPRETED) * scale
    if ON_K:
        scores += look_up(lk0, lk1, ids0, ids1, PARTS, INTERPRETED)
    if ON_Q:
        scores += tl.trans(look_up(lq0, lq1, back0, back1, PARTS, INTERPRETED))
    return scores


@triton.jit
def keep_mask(seed_pointer, plane, queries, first_key, length, dropout_p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(queries, keys) bool, False with probability `dropout_p`: a function of the seed and the element alone.

    Philox makes four numbers at a time: for four neighbouring keys.
    """
    fours = first_key // 4 + tl.arange(0, BLOCK_N // 4)
    element = queries[:, None] * tl.cdiv(length, 4) + fours[None, :]
    zero = element * 0
    a, b, c, d = tl.philox(tl.load(seed_pointer), element, zero + plane, zero, zero)
    bits = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK_M, BLOCK_N])  # a, b, c, d of the first four, ...
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def mask_scores(
    scores,
    padding,
    mask,
    mask_query_stride,
    mask_key_stride,
    queries,
    keys,
    length,
    PADDING: tl.constexpr,
    MASK: tl.constexpr,
):
    inside = (queries[:, None] < length) & (keys[None, :] < length)
    if MASK != "none":
        where = queries[:, None].to(tl.int64) * mask_query_stride + keys[None, :].to(tl.int64) * mask_key_stride
        if MASK == "bool":
            scores = tl.where(tl.load(mask + where, mask=inside, other=1) != 0, float("-inf"), scores)
        else:
            scores += tl.load(mask + where, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    if PADDING:
        ignored = tl.load(padding + keys, mask=keys < length, other=1) != 0
        scores = tl.where(ignored[None, :], float("-inf"), scores)
    return tl.where(keys[None, :] < length, scores, float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q, k, v, lookup_k, lookup_q, offset_table, padding, mask, seed, out, kept, peaks, log_sums,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    lk_batch, lk_head, lk_row, lq_batch, lq_head, lq_row, mask_batch, mask_head, mask_query, mask_key,
    heads, length, height, width, skip, table_size, scale, dropout_p, first, rows, kept_row,
    ON_K: tl.constexpr, ON_Q: tl.constexpr, ON_V: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_M queries of one (batch, head) and runs over the keys with an online softmax (base 2)."""
    tiles = tl.cdiv(rows, BLOCK_M)
    plane = tl.program_id(0) // tiles
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    queries = first + tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    lookup_k += tl.multiple_of(batch * lk_batch + head * lk_head, 8)
    lookup_q += tl.multiple_of(batch * lq_batch + head * lq_head, 8)
    mask += batch * mask_batch + head * mask_head
    padding += batch * length
    out += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    peaks += plane.to(tl.int64) * rows * tl.cdiv(length, BLOCK_N)
    log_sums += plane.to(tl.int64) * length

    q_tile = load_rows(q, queries, q_row, length, HEAD, HEAD_DIM)
    m_query, m_key = positions(queries, length, height, width, skip)
    lk0, lk1 = load_parts(lookup_k, queries, lk_row // 8 * 8, length, COLUMNS, PADDED, PARTS, ON_K)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, HEAD], tl.float32)

    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        n_query, n_key = positions(keys, length, height, width, skip)
        k_tile = load_rows(k, keys, k_row, length, HEAD, HEAD_DIM)
        ids0, ids1 = pair_ids(offset_table, table_size, m_query, n_key, PARTS, ON_K)
        back0, back1 = pair_ids(offset_table, table_size, n_query, m_key, PARTS, ON_Q)
        lq0, lq1 = load_parts(lookup_q, keys, lq_row // 8 * 8, length, COLUMNS, PADDED, PARTS, ON_Q)
        scores = encoded_scores(q_tile, k_tile, scale, lk0, lk1, ids0, ids1, lq0, lq1, back0, back1,
                                ON_K, ON_Q, PARTS, PRECISION, INTERPRETED)  # fmt: skip
        scores = mask_scores(scores * LOG2_E, padding, mask, mask_query, mask_key, queries, keys, length, PADDING, MASK)

        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A query without a key so far has -inf here, and -inf - -inf is NaN.
        finite = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - finite)
        weights = tl.exp2(scores - finite[:, None])
        highest = new_highest
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            keep = keep_mask(seed, plane, queries, start, length, dropout_p, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights / (1 - dropout_p), 0.0)
        v_tile = load_rows(v, keys, v_row, length, HEAD, HEAD_DIM)
        result = result * shrink[:, None] + dot(weights.to(v_tile.dtype), v_tile, PRECISION, INTERPRETED)
        if ON_V:  # relative to the highest score so far, which the sums need to know
            keep_rows(kept, plane, queries, first, rows, kept_row, keys, weights)
            peak = peaks + (queries - first) * tl.cdiv(length, BLOCK_N) + start // BLOCK_N
            tl.store(peak, highest, mask=queries < first + rows)

    empty = total == 0.0  # all keys masked: the answer is zero, and so are its gradients
    divisor = tl.where(empty, 1.0, total)
    store_rows(out, queries, heads * HEAD_DIM, length, result / divisor[:, None], HEAD, HEAD_DIM)
    log_sum = tl.where(empty, float("inf"), highest + tl.log2(divisor))
    tl.store(log_sums + queries, log_sum, mask=queries < length)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    q, k, v, lookup_k, lookup_q, offset_table, padding, mask, seed, out, sums, log_sums,
    grad_out, grad_sums, grad_q, kept, deltas,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    lk_batch, lk_head, lk_row, lq_batch, lq_head, lq_row, mask_batch, mask_head, mask_query, mask_key,
    go_batch, go_head, go_row, heads, length, height, width, skip, table_size, scale, dropout_p, first, rows, kept_row,
    ON_K: tl.constexpr, ON_Q: tl.constexpr, ON_V: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_M queries: gradients of q and of the scores, and ``delta``, the softmax's sum of p * dp."""
    tiles = tl.cdiv(rows, BLOCK_M)
    plane = tl.program_id(0) // tiles
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    queries = first + tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    lookup_k += tl.multiple_of(batch * lk_batch + head * lk_head, 8)
    lookup_q += tl.multiple_of(batch * lq_batch + head * lq_head, 8)
    mask += batch * mask_batch + head * mask_head
    padding += batch * length
    grad_out += batch * go_batch + head * go_head
    out += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    grad_q += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    bucketed = plane.to(tl.int64) * length * (PARTS * PADDED)
    log_sums += plane.to(tl.int64) * length
    deltas += plane.to(tl.int64) * length

    q_tile = load_rows(q, queries, q_row, length, HEAD, HEAD_DIM)
    go_tile = load_rows(grad_out, queries, go_row, length, HEAD, HEAD_DIM)
    out_tile = load_rows(out, queries, heads * HEAD_DIM, length, HEAD, HEAD_DIM)
    delta = tl.sum(go_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    s0, s1 = load_parts(sums + bucketed, queries, PARTS * PADDED, length, COLUMNS, PADDED, PARTS, ON_V)
    gs0, gs1 = load_parts(grad_sums + bucketed, queries, PARTS * PADDED, length, COLUMNS, PADDED, PARTS, ON_V)
    if ON_V:
        delta += tl.sum(gs0.to(tl.float32) * s0.to(tl.float32), 1)
        if PARTS == 2:
            delta += tl.sum(gs1.to(tl.float32) * s1.to(tl.float32), 1)
    tl.store(deltas + queries, delta, mask=queries < length)
    log_sum = tl.load(log_sums + queries, mask=queries < length, other=float("inf"))
    m_query, m_key = positions(queries, length, height, width, skip)
    lk0, lk1 = load_parts(lookup_k, queries, lk_row // 8 * 8, length, COLUMNS, PADDED, PARTS, ON_K)
    gq = tl.zeros([BLOCK_M, HEAD], tl.float32)

    for start in range(0, length, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        n_query, n_key = positions(keys, length, height, width, skip)
        k_tile = load_rows(k, keys, k_row, length, HEAD, HEAD_DIM)
        v_tile = load_rows(v, keys, v_row, length, HEAD, HEAD_DIM)
        ids0, ids1 = pair_ids(offset_table, table_size, m_query, n_key, PARTS, ON_K or ON_V)
        back0, back1 = pair_ids(offset_table, table_size, n_query, m_key, PARTS, ON_Q)
        lq0, lq1 = load_parts(lookup_q, keys, lq_row // 8 * 8, length, COLUMNS, PADDED, PARTS, ON_Q)
        scores = encoded_scores(q_tile, k_tile, scale, lk0, lk1, ids0, ids1, lq0, lq1, back0, back1,
                                ON_K, ON_Q, PARTS, PRECISION, INTERPRETED)  # fmt: skip
        grad = dot(go_tile, tl.trans(v_tile), PRECISION, INTERPRETED)
        if ON_V:
            grad += look_up(gs0, gs1, ids0, ids1, PARTS, INTERPRETED)
        scores = mask_scores(scores * LOG2_E, padding, mask, mask_query, mask_key, queries, keys, length, PADDING, MASK)
        weights = tl.exp2(scores - log_sum[:, None])
        if DROPOUT:
            keep = keep_mask(seed, plane, queries, start, length, dropout_p, BLOCK_M, BLOCK_N)
            grad = tl.where(keep, grad / (1 - dropout_p), 0.0)
        grad = weights * (grad - delta[:, None])
        gq += dot(grad.to(k_tile.dtype), k_tile, PRECISION, INTERPRETED)
        if ON_K:
            keep_rows(kept, plane, queries, first, rows, kept_row, keys, grad)

    store_rows(grad_q, queries, heads * HEAD_DIM, length, gq * scale, HEAD, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def key_gradient_kernel(
    q, k, v, lookup_k, lookup_q, offset_table, padding, mask, seed, log_sums, deltas,
    grad_out, grad_sums, grad_k, grad_v, kept,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    lk_batch, lk_head, lk_row, lq_batch, lq_head, lq_row, mask_batch, mask_head, mask_query, mask_key,
    go_batch, go_head, go_row, heads, length, height, width, skip, table_size, scale, dropout_p, first, rows, kept_row,
    ON_K: tl.constexpr, ON_Q: tl.constexpr, ON_V: tl.constexpr, PADDING: tl.constexpr, MASK: tl.constexpr,
    DROPOUT: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_N keys and runs over the queries: gradients of k, v and of the scores, transposed."""
    tiles = tl.cdiv(rows, BLOCK_N)
    plane = tl.program_id(0) // tiles
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    first_key = first + tl.program_id(0) % tiles * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    lookup_k += tl.multiple_of(batch * lk_batch + head * lk_head, 8)
    lookup_q += tl.multiple_of(batch * lq_batch + head * lq_head, 8)
    mask += batch * mask_batch + head * mask_head
    padding += batch * length
    grad_out += batch * go_batch + head * go_head
    grad_k += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    grad_v += batch * length * heads * HEAD_DIM + head * HEAD_DIM
    bucketed = plane.to(tl.int64) * length * (PARTS * PADDED)
    log_sums += plane.to(tl.int64) * length
    deltas += plane.to(tl.int64) * length

    k_tile = load_rows(k, keys, k_row, length, HEAD, HEAD_DIM)
    v_tile = load_rows(v, keys, v_row, length, HEAD, HEAD_DIM)
    n_query, n_key = positions(keys, length, height, width, skip)
    lq0, lq1 = load_parts(lookup_q, keys, lq_row // 8 * 8, length, COLUMNS, PADDED, PARTS, ON_Q)
    gk = tl.zeros([BLOCK_N, HEAD], tl.float32)
    gv = tl.zeros([BLOCK_N, HEAD], tl.float32)

    for start in range(0, length, BLOCK_M):
        queries = start + tl.arange(0, BLOCK_M)
        m_query, m_key = positions(queries, length, height, width, skip)
        q_tile = load_rows(q, queries, q_row, length, HEAD, HEAD_DIM)
        go_tile = load_rows(grad_out, queries, go_row, length, HEAD, HEAD_DIM)
        log_sum = tl.load(log_sums + queries, mask=queries < length, other=float("inf"))
        delta = tl.load(deltas + queries, mask=queries < length, other=0.0)
        ids0, ids1 = pair_ids(offset_table, table_size, m_query, n_key, PARTS, ON_K or ON_V)
        back0, back1 = pair_ids(offset_table, table_size, n_query, m_key, PARTS, ON_Q)
        lk0, lk1 = load_parts(lookup_k, queries, lk_row // 8 * 8, length, COLUMNS, PADDED, PARTS, ON_K)
        scores = encoded_scores(q_tile, k_tile, scale, lk0, lk1, ids0, ids1, lq0, lq1, back0, back1,
                                ON_K, ON_Q, PARTS, PRECISION, INTERPRETED)  # fmt: skip
        grad = dot(go_tile, tl.trans(v_tile), PRECISION, INTERPRETED)
        if ON_V:
            gs0, gs1 = load_parts(grad_sums + bucketed, queries, PARTS * PADDED, length, COLUMNS, PADDED, PARTS, ON_V)
            grad += look_up(gs0, gs1, ids0, ids1, PARTS, INTERPRETED)
        scores = mask_scores(scores * LOG2_E, padding, mask, mask_query, mask_key, queries, keys, length, PADDING, MASK)
        weights = tl.exp2(scores - log_sum[:, None])
        dropped = weights
        if DROPOUT:
            keep = keep_mask(seed, plane, queries, first_key, length, dropout_p, BLOCK_M, BLOCK_N)
            dropped = tl.where(keep, weights / (1 - dropout_p), 0.0)
            grad = tl.where(keep, grad / (1 - dropout_p), 0.0)
        gv += dot(tl.trans(dropped.to(go_tile.dtype)), go_tile, PRECISION, INTERPRETED)
        grad = weights * (grad - delta[:, None])
        gk += dot(tl.trans(grad.to(q_tile.dtype)), q_tile, PRECISION, INTERPRETED)
        if ON_Q:
            keep_rows(kept, plane, keys, first, rows, kept_row, queries, tl.trans(grad))

    store_rows(grad_k, keys, heads * HEAD_DIM, length, gk * scale, HEAD, HEAD_DIM)
    store_rows(grad_v, keys, heads * HEAD_DIM, length, gv, HEAD, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def sum_kernel(
    kept, peaks, log_sums, offset_table, sums,
    planes, length, height, width, skip, table_size, first, rows, kept_row,
    RELATIVE: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    ALL_COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """sums[p, i, n]: the sum of kept[p, i, j] over the tokens j with id(i, j) == n, of one token i in BLOCK_P planes.

    The ids of a token are the same in all planes: a product with a matrix of zeros and ones, which has two ones a
    key for two maps. RELATIVE values still have to be multiplied by 2 ** (peak of their tile - log_sum).
    """
    token = first + tl.program_id(0)
    plane = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = plane.to(tl.int64) * rows + tl.program_id(0)
    kept_row = kept_row // 8 * 8  # as it is, see keep_rows
    as_query, unused = positions(token, length, height, width, skip)
    columns = tl.arange(0, ALL_COLUMNS)
    total = tl.zeros([BLOCK_P, ALL_COLUMNS], tl.float32)
    if RELATIVE:
        log_sum = tl.load(log_sums + plane.to(tl.int64) * length + token, mask=plane < planes, other=float("inf"))
    for start in range(0, length, BLOCK_N):
        others = start + tl.arange(0, BLOCK_N)
        other_query, as_key = positions(others, length, height, width, skip)
        pair = offset_table + (as_query - as_key)
        ones = columns[:, None] == tl.load(pair).to(tl.int32)[None, :]  # (buckets, keys): few keys a thread
        if PARTS == 2:
            ones = ones | (columns[:, None] == tl.load(pair + table_size).to(tl.int32)[None, :] + PADDED)
        mask = (plane < planes)[:, None] & (others < kept_row)[None, :]
        values = tl.load(kept + row[:, None] * kept_row + others[None, :], mask=mask, other=0.0)
        # Three products of TF32 parts are as exact as one of fp32; halves are exact as they are.
        here = dot(values, tl.trans(tl.where(ones, 1.0, 0.0).to(values.dtype)), "tf32x3", INTERPRETED)
        if RELATIVE:
            peak = tl.load(peaks + row * tl.cdiv(length, BLOCK_N) + start // BLOCK_N, mask=plane < planes, other=0.0)
            here = here * tl.exp2(peak - log_sum)[:, None]
        total += here
    where = (plane.to(tl.int64) * length + token)[:, None] * (PARTS * PADDED) + columns[None, :]
    mask = (plane < planes)[:, None] & (columns < PARTS * PADDED)[None, :]
    tl.store(sums + where, total.to(sums.dtype.element_ty), mask=mask)
