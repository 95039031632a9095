// The CUDA kernel of small images whose planes lie in one piece: each warp makes one after the
// other on its own. The first pixels of the next are on their way from memory while it computes.
#pragma once
#include "fused_cuda_passes.h"

namespace fused {
namespace {

constexpr int kPixels = kWarp * kFour;  // that a warp moves at once
constexpr int kBlocks = 4;      // resident on a processor, by registers; 5 spill (sm_90 code)
constexpr int kWarpImages = 4;  // images for each processor from which on a warp takes each

struct SmallTiling {
  int pixels;       // of a plane; the windows lie behind them
  int sums, bytes;  // floats from the chunk's begin; bytes for a warp
  Shape shape;
};

// What a thread loads before it mixes: fours of neighbouring pixels, kPixels apart, of each term.
template <int terms, bool interleaved, typename In>
struct Raw {
  static constexpr int count = kRowsAtOnce<In>;
  Four<In> fours[count][terms];

  __device__ void load(const In* const (&at)[terms], int left) {
#pragma unroll
    for (int j = 0; j < count; ++j) {
      if (j * kPixels >= left) break;
#pragma unroll
      for (int i = 0; i < terms; ++i) {
        fours[j][i].load(at[i] + j * kPixels * (interleaved ? terms : 1));
      }
    }
  }
  __device__ void mix(const float (&w)[terms], int left, float* chunk) const {
#pragma unroll
    for (int j = 0; j < count; ++j) {
      if (j * kPixels >= left) break;
      float sum[kFour] = {};
      add_mix<terms, interleaved>(fours[j], w, sum);
      Four<float> result;
      result.set(sum);
      result.store(chunk + j * kPixels);
    }
  }
};

// Channel k of image n, the next that the warp makes: where its terms begin, and their weights.
template <int terms, bool interleaved, typename In>
struct Next {
  int64_t n;
  int k = 0;
  const In* at[terms];
  float weights[terms];
  const int32_t *row_table, *column_table;

  __device__ void find(int rank, const Problem& p, const Terms<float>& mix) {
    const In* const from = static_cast<const In*>(p.source) + p.from.image(n) +
                           rank * kFour * (interleaved ? terms : 1);
    row_table = p.rows.table(n), column_table = p.columns.table(n);
#pragma unroll
    for (int i = 0; i < terms; ++i) {
      const int term = k * terms + i;
      weights[i] = mix.weight[term];
      at[i] = from + (interleaved ? i * kFour : mix.channel[term] * p.from.channel);
    }
  }
};

template <int terms, bool interleaved, typename In>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fused_small_images_kernel(Problem p, Terms<float> mix, SmallTiling tiling) {
  FUSED_SHARED(memory);
  using Raw = Raw<terms, interleaved, In>;
  constexpr int teams = kThreads / kWarp, step = Raw::count * kPixels;
  const int rank = static_cast<int>(threadIdx.x) % kWarp;
  const int team = static_cast<int>(threadIdx.x) / kWarp;
  const int height = static_cast<int>(p.rows.out), width = static_cast<int>(p.columns.out);
  const int rows = static_cast<int>(p.rows.in), columns = static_cast<int>(p.columns.in);
  const Shape& shape = tiling.shape;
  const Place fours(rank, kWarp, shape.pitch / kFour), column(rank, kWarp, width);
  float* const chunk = reinterpret_cast<float*>(memory + team * tiling.bytes);
  auto* const windows = reinterpret_cast<Window<float>*>(chunk + tiling.pixels);
  float* const sums = chunk + tiling.sums;
  const int left = tiling.pixels - rank * kFour;
  bool first = true;
  Column<float> own;
  Raw raw;
  Next<terms, interleaved, In> next{int64_t{blockIdx.x} * teams + team};
  if (next.n >= p.images) return;
  next.find(rank, p, mix);
  raw.load(next.at, left);
  do {
#pragma unroll 1
    for (int done = 0;;) {
      raw.mix(next.weights, left - done, chunk + rank * kFour + done);
      done += step;
      if (done >= tiling.pixels) break;
#pragma unroll
      for (int i = 0; i < terms; ++i) next.at[i] += step * (interleaved ? terms : 1);
      raw.load(next.at, left - done);
    }
    const int64_t n = next.n;
    const int k = next.k;
    const int32_t *const row_table = next.row_table, *const column_table = next.column_table;
    if (++next.k == mix.planes) next.k = 0, next.n += int64_t{gridDim.x} * teams;
    if (next.n < p.images) {
      next.find(rank, p, mix);
      raw.load(next.at, left);
    }
    if (first || p.rows.index) {
      read_windows(rank, kWarp, p.rows, row_table, 0, height, 0, rows, shape, windows);
    }
    if ((first || p.columns.index) && column.y < column.step) {
      own.set(Taps<float>(p.columns, column_table, column.x, 0, columns));
    }
    first = false;
    __syncwarp();
    if (fours.y < fours.step) {
      resample_rows(fours, p.rows, row_table, 0, 0, rows, shape, windows, false, chunk, sums);
    }
    __syncwarp();
    if (column.y < column.step) {
      resample_columns(p, mix, k, column, shape, own, height, width, p.to.image(n), sums);
    }
    __syncwarp();
  } while (next.n < p.images);
}

}  // namespace
}  // namespace fused
