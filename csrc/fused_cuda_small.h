// The CUDA kernel for small images without gaps between rows: each warp makes one plane after
// another by itself, and loads the first pixels of the next while it computes.
#pragma once
#include "fused_cuda_passes.h"

namespace fused {
namespace {

constexpr int kPixels = kWarp * kFour;  // that a warp moves at once
constexpr int kBlocks = 4;      // resident on a multiprocessor, by registers; 5 spill (sm_90 code)
constexpr int kWarpImages = 4;  // images per multiprocessor from which a warp takes a whole image

struct SmallTiling {
  int pixels;       // of a plane; behind them lie a row of zeros and the windows
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

  __device__ void find(int rank, const Problem& p, const Terms<float>& mix) {
    const In* const from = static_cast<const In*>(p.source) + p.from.image(n) +
                           rank * kFour * (interleaved ? terms : 1);
#pragma unroll
    for (int i = 0; i < terms; ++i) {
      const int term = k * terms + i;
      weights[i] = mix.weight[term];
      at[i] = from + (interleaved ? i * kFour : mix.channel[term] * p.from.channel);
    }
  }
};

template <bool few, int terms, bool interleaved, typename In>
__global__ void __launch_bounds__(kThreads, kBlocks)
    fused_small_images_kernel(Problem p, Terms<float> mix, SmallTiling tiling) {
  FUSED_SHARED(memory);
  using Raw = Raw<terms, interleaved, In>;
  constexpr int teams = kThreads / kWarp, step = Raw::count * kPixels;
  const int rank = static_cast<int>(threadIdx.x) % kWarp;
  const int team = static_cast<int>(threadIdx.x) / kWarp;
  const int height = static_cast<int>(p.rows.out), width = static_cast<int>(p.columns.out);
  const int rows = static_cast<int>(p.rows.in), left = tiling.pixels - rank * kFour;
  Raw raw;
  Next<terms, interleaved, In> next{int64_t{blockIdx.x} * teams + team};
  if (next.n >= p.images) return;
  next.find(rank, p, mix);
  raw.load(next.at, left);  // on their way while the tables are read
  const Shape& shape = tiling.shape;
  const Place fours(rank, kWarp, shape.pitch / kFour), column(rank, kWarp, width);
  float* const chunk = reinterpret_cast<float*>(memory + team * tiling.bytes);
  auto* const windows = reinterpret_cast<Window<float>*>(chunk + tiling.pixels + shape.pitch);
  float* const sums = chunk + tiling.sums;
  // with `few`, pixels without taps see this row and this column of zeros
  for (int i = rank; i < shape.pitch; i += kWarp) chunk[tiling.pixels + i] = 0;
  for (int i = rank; i < shape.groups * kFour; i += kWarp) {
    sums[i / kFour * shape.stride + Shape::slot(shape.pitch) + i % kFour] = 0;
  }
  bool first = true;
  Column<few, float> own;
  do {
    if (next.k == 0 && (first || p.rows.index)) {
      read_windows<few>(rank, kWarp, p.rows, p.rows.table(next.n), 0, height, 0, rows, shape,
                        windows, 1u << kCountShift | tiling.pixels);
    }
    if (next.k == 0 && (first || p.columns.index) && column.y < column.step) {
      own.set(p.columns, Taps<float>(p.columns, p.columns.table(next.n), column.x), shape.pitch);
    }
    first = false;
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
    if (++next.k == mix.planes) next.k = 0, next.n += int64_t{gridDim.x} * teams;
    if (next.n < p.images) {
      next.find(rank, p, mix);
      raw.load(next.at, left);
    }
    __syncwarp();
    if (fours.y < fours.step) {
      resample_rows<few>(fours, p.rows, p.rows.table(n), 0, 0, rows, shape, windows, false, chunk,
                         sums);
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
