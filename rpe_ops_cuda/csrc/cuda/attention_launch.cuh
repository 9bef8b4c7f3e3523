// SPDX-License-Identifier: Apache-2.0
// How the attention kernels share their work: among blocks of threads, and shared memory within a block.
#pragma once

#include <algorithm>
#include <utility>

#include "attention_buckets.cuh"

namespace irpe {
namespace {

constexpr int kMaxWarps = 16;
constexpr float kLog2e = 1.4426950408889634f;

// A launch does `items`, a group of own tokens of one head each. A block of threads takes every so-manieth of them and meets
// all other tokens of the head, `rows` at a time.
struct Work {
  int blocks, groups, items, rows;  // blocks of 16 tokens in a head
  int first_plane;                  // a plane is a head of an image
  bool by_head;                     // consecutive items are of one head: its tables stay loaded
};

struct Item {
  unsigned batch, head, group, plane;  // plane: counted from the launch's first
};

__device__ __forceinline__ Item item_of(const Work& work, const AttentionCall& call, unsigned number) {
  const unsigned groups = work.groups, fast = work.by_head ? call.batch : call.heads, plane = number / groups;
  const unsigned place = work.first_plane + plane, slow = place / fast, rest = place - slow * fast;
  return {work.by_head ? rest : slow, work.by_head ? slow : rest, number - plane * groups, plane};
}

// A block's shared memory, in bytes: tables, then what each warp has for its own 16 tokens (lookups, or room for rows; bucket
// sums), then two turns of tiles, then what belongs to each of a tile's tokens (lookups; log_sums and deltas).
template <int tables, int own_bytes, bool has_sums, int tiles, bool has_others, bool has_statistics>
struct Room {
  static constexpr int kTableRows = has_sums ? 64 : kMostBuckets;  // products with sums take 16 rows at a time
  static constexpr int kTiles = tiles, kTables = tables * kTableRows * kRowBytes;
  static constexpr int kSums = std::max(kRows * kLookupStride * own_bytes, kRows * kRowBytes);
  static constexpr int kPerWarp = kSums + (has_sums ? kSumBytes : 0);
  static constexpr int kPerRow = 2 * tiles * kRowBytes + (has_others ? kLookupStride * 4 : 0) + (has_statistics ? 3 * 4 : 0);
  static constexpr int bytes(int warps, int rows) { return kTables + warps * kPerWarp + rows * kPerRow; }
};

// Where the parts of a Room lie; `own`, `buckets` and `room` are the warp's.
template <typename R, typename T>
struct Parts {
  T *table_k, *table_q, *table_v;
  unsigned char *own, *buckets;
  T *room, *tiles;  // room for 16 rows: after the last lookup
  void* others;

  __device__ Parts(unsigned char* shared, int warps, int warp, int rows)
      : table_k(reinterpret_cast<T*>(shared)),
        table_q(table_k + R::kTableRows * kHeadDim),
        table_v(table_q + R::kTableRows * kHeadDim),
        own(shared + R::kTables + warp * R::kPerWarp),
        buckets(own + R::kSums),
        room(reinterpret_cast<T*>(own)),
        tiles(reinterpret_cast<T*>(shared + R::kTables + warps * R::kPerWarp)),
        others(tiles + 2 * R::kTiles * rows * kHeadDim) {}
};

struct Device {
  int major = 0, processors = 0, block_bytes = 0, bytes = 0;
};

cudaError_t describe(Device& device) {
  int number = 0;
  if (const cudaError_t error = cudaGetDevice(&number)) return error;
  const std::pair<int*, cudaDeviceAttr> wanted[] = {
      {&device.major, cudaDevAttrComputeCapabilityMajor},
      {&device.processors, cudaDevAttrMultiProcessorCount},
      {&device.block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&device.bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
  };
  for (const auto& [value, attribute] : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, number)) return error;
  }
  return cudaSuccess;
}

int divided(int n, int by) { return (n + by - 1) / by; }

// Launches a kernel for `planes` heads of images.
template <typename R>
cudaError_t launch(void (*kernel)(AttentionCall, Work), const AttentionCall& call, int first_plane, int planes,
                   cudaStream_t stream) {
  Device device;
  if (const cudaError_t error = describe(device)) return error;
  if (device.major < 8) return cudaErrorInvalidConfiguration;
  // As many warps as let the most heads run at once, each in tiles as large as fit: between tiles warps wait for each other,
  // within one they drift apart, so that one multiplies while another looks up.
  Work work{};
  int warps = 0, at_once = 0;
  const int blocks = divided(call.length, kRows);
  for (int w = 1; w <= std::min(kMaxWarps, blocks); ++w) {
    int tiles = 1;
    const auto rows = [&] { return divided(blocks, tiles) * kRows; };
    while (tiles < blocks && R::bytes(w, rows()) > device.block_bytes) ++tiles;
    if (R::bytes(w, rows()) > device.block_bytes) break;
    const int groups = divided(blocks, w), together = std::max(1, std::min(kMaxWarps / w, device.bytes / (R::bytes(w, rows()) + 1024)));
    const int ours = together * work.groups, best = at_once * groups;
    if (warps == 0 || ours > best || (ours == best && groups < work.groups)) {
      work = {blocks, groups, planes * groups, rows(), first_plane, false}, warps = w, at_once = together;
    }
  }
  if (warps == 0) return cudaErrorInvalidConfiguration;
  work.by_head = call.on_k.head_stride || call.on_q.head_stride || call.on_v.head_stride;
  const int bytes = R::bytes(warps, work.rows);
  const void* const code = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return error;
  kernel<<<static_cast<unsigned>(std::min(work.items, device.processors * at_once)), warps * 32, bytes, stream>>>(call, work);
  return cudaGetLastError();
}

}  // namespace
}  // namespace irpe
