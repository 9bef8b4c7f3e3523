// SPDX-License-Identifier: Apache-2.0
// What is computed once for a map of bucket ids, so that the kernels need not look at single ids.
// Plain data and no standard headers: the kernels are compiled for several instruction sets, and an inline function of a
// header compiled for AVX-512 could be the copy the linker keeps for everybody.
#pragma once
#include <stdint.h>

namespace irpe {

constexpr int32_t kLookupLanes = 8;  // floats in the registers that lookups and bucket sums use

// Lookup. Neighbouring keys have neighbouring ids: the keys are cut into segments of at most kLookupLanes keys whose ids
// span fewer than kLookupLanes buckets for every query, so one load of that many table entries from `base` and one register
// permutation by the 4-bit offsets in `perm` look up a whole segment. For product maps a segment is (a part of) a grid row.
//
// Bucket sums. A map is separable if id = row_part(query row, key row) + column_part(query column, key column) but for the
// leading tokens, which share one bucket. Then grid rows are summed into slots first (vector adds), then columns into buckets.
//
// The encoding on queries looks its map up by columns: id(j, i) for a query i and every key j. Its table has buckets as rows and
// keys as columns, so neighbouring keys read different rows and nothing can be permuted. But neighbouring keys often share a
// bucket: a piece of at most kLookupLanes such keys is one plain load from, or add to, a row of the table.
struct PlanView {
  int64_t rows, cols;       // queries, keys
  int32_t min_id, max_id;
  const uint16_t* ids;      // (rows, cols)

  bool segmented;           // false: too few keys a segment; ids are looked up one by one
  int64_t num_segments;
  const int32_t* seg_start; // (num_segments + 1), the last one is cols
  const uint16_t* base;     // (rows, num_segments) smallest id
  const uint32_t* perm;     // (rows, num_segments) id - base, 4 bits a key

  bool separable;
  int64_t skip, height, width;   // cols = skip + height * width
  int32_t skip_id;               // bucket of the leading tokens
  int32_t num_slots;             // different row parts
  int32_t col_span, col_padded;  // column parts are 0 .. col_span - 1; padded to whole registers
  const int32_t* slot_base;      // (num_slots) bucket of column part 0
  const int32_t* slot_first;     // (height, num_slots + 1) where the key rows of a slot begin in slot_rows
  const int32_t* slot_rows;      // (height, height) key rows ordered by slot
  const int32_t* col_part;       // (width, width)
  const float* one_hot;          // (width, width, col_padded) 1 where the key column has that column part, else 0;
                                 // null where that would be large or slots share buckets: columns are then added one by one

  // A plan made for columns has, of the above, rows, cols, the range of ids and, if separable, skip, skip_id, height and width.
  const int32_t* row_base;        // (height, height) bucket of column part 0 for a query row and a key row
  const int32_t* part_of;         // (width, chunks * kLookupLanes) column part for a query column and a key column, else -1
  const int32_t* part_range;      // (width, chunks, 2) the least and the greatest of these in a register of key columns
  const int64_t* piece_first;     // (cols + 1) where the pieces of a column begin in the next two
  const uint8_t* piece_keys;      // keys of a piece; those of a column follow each other and make up all its rows
  const uint16_t* piece_id;
};

}  // namespace irpe
