// The CUDA kernel of small images whose planes lie in one piece: each warp makes one after the
// other on its own. The first pixels of the next are on their way from memory while it computes.
#pragma once
#include "fused_cuda_kernel.h"

namespace fused {
namespace {

constexpr int kPixels = kWarp * kFour;  // that a warp moves at once
constexpr int kBlocks = 4;      // resident on a processor, by registers; 5 spill (sm_90 code)
constexpr int kWarpImages = 4;  // images for each processor from which on a warp takes each
constexpr int kCountShift = 24, kMaxCount = 255;  // of Window::head

// The pixels that an output row sees: where in the chunk the first is, and the first weights.
struct alignas(16) Window {
  unsigned head;  // count << kCountShift | floats from the chunk's begin
  float weights[kFew];
};

struct SmallTiling {
  int pixels, pitch, groups, stride;  // of a plane; of a row; groups of four rows, floats of one
  int windows, sums, bytes;           // floats from the chunk's begin; bytes for a warp
  bool more_rows, more_columns;       // than kFew taps
};

// Where the four rows of column c are in a group. The gap after every eight columns spreads the
// stores of a warp over the banks.
__device__ int slot(int c) { return (c + c / 8) * kFour; }

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
#pragma unroll
      for (int i = 0; i < terms; ++i) {
        if (interleaved && w[i] == 0) continue;
#pragma unroll
        for (int q = 0; q < kFour; ++q) {
          const int index = interleaved ? q * terms + i : i * kFour + q;
          sum[q] += fours[j][index / kFour].template pixel<float>(index % kFour) * w[i];
        }
      }
      Four<float> result;
      result.set(sum);
      result.store(chunk + j * kPixels);
    }
  }
};

__device__ void read_windows(int rank, const Bands& bands, const int32_t* table, int groups,
                             int pitch, Window* windows) {
#pragma unroll 1
  for (int o = rank; o < groups * kFour; o += kWarp) {
    Window window{};
    if (o < bands.out) {
      const Taps<true, float> taps(bands, table, o, 0, 0);
      window.head = static_cast<unsigned>(taps.count) << kCountShift | taps.first * pitch;
#pragma unroll
      for (int t = 0; t < kFew; ++t) {
        if (t < taps.count) window.weights[t] = taps.weights[t * kLanes];
      }
    }
    windows[o] = window;
  }
}

// The vertical pass, four rows of four columns at a time. The four rows of a column lie side by
// side afterwards, so that the horizontal pass reads them at once.
__device__ void resample_rows(const Place& place, const SmallTiling& tiling, const Window* windows,
                              const float* chunk, float* sums) {
  chunk += place.x * kFour;
#pragma unroll 1
  for (int g = place.y; g < tiling.groups; g += place.step) {
    float sum[kFour][kFour] = {};
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      const Window window = windows[g * kFour + j];
      const float* from = chunk + window.head % (1u << kCountShift);
#pragma unroll
      for (unsigned t = 0; t < kFew; ++t, from += tiling.pitch) {
        if (window.head < (t + 1) << kCountShift) continue;
        Four<float> four;
        float pixels[kFour];
        four.load(from);
        four.get(pixels);
#pragma unroll
        for (int q = 0; q < kFour; ++q) sum[q][j] += pixels[q] * window.weights[t];
      }
    }
#pragma unroll
    for (int q = 0; q < kFour; ++q) {
      Four<float> result;
      result.set(sum[q]);
      result.store(sums + g * tiling.stride + slot(place.x * kFour + q));
    }
  }
}

// The taps beyond the first: added.
__device__ void resample_rows_more(const Place& place, const SmallTiling& tiling,
                                   const Bands& bands, const int32_t* table, const float* chunk,
                                   float* sums) {
  const int x = place.x * kFour;
#pragma unroll 1
  for (int g = place.y; g < tiling.groups; g += place.step) {
#pragma unroll 1
    for (int j = 0; j < kFour && g * kFour + j < bands.out; ++j) {
      const Taps<true, float> taps(bands, table, g * kFour + j, 0, 0);
#pragma unroll 1
      for (int t = kFew; t < taps.count; ++t) {
        const float* const from = chunk + (taps.first + t) * tiling.pitch + x;
        const float w = taps.weights[t * kLanes];
#pragma unroll
        for (int q = 0; q < kFour; ++q) sums[g * tiling.stride + slot(x + q) + j] += from[q] * w;
      }
    }
  }
}

// The horizontal pass into the tile: of a column that a thread keeps, four rows at once.
struct Column {
  int count;
  float weights[kFew];
  int at[kFew];

  __device__ void read(const Place& place, const Bands& bands, const int32_t* table) {
    const Taps<true, float> taps(bands, table, min(place.x, static_cast<int>(bands.out) - 1), 0, 0);
    count = taps.count;
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
      weights[t] = t < count ? taps.weights[t * kLanes] : 0.f;
      at[t] = slot(taps.first + t);
    }
  }

  __device__ void resample(const Place& place, const SmallTiling& tiling, int width,
                           const float* sums, float* tile) const {
    sums += place.y * tiling.stride, tile += place.y * kFour * width + place.x;
#pragma unroll 1
    for (int g = place.y; g < tiling.groups; g += place.step) {
      float sum[kFour] = {};
#pragma unroll
      for (int t = 0; t < kFew; ++t) {
        if (t >= count) continue;
        Four<float> four;
        float pixels[kFour];
        four.load(sums + at[t]);
        four.get(pixels);
#pragma unroll
        for (int j = 0; j < kFour; ++j) sum[j] += pixels[j] * weights[t];
      }
#pragma unroll
      for (int j = 0; j < kFour; ++j) tile[j * width] = sum[j];
      sums += place.step * tiling.stride, tile += place.step * kFour * width;
    }
  }

  // The taps beyond the first: added.
  __device__ void resample_more(const Place& place, const SmallTiling& tiling, const Bands& bands,
                                const int32_t* table, const float* sums, float* tile) const {
    const Taps<true, float> taps(bands, table, place.x, 0, 0);
#pragma unroll 1
    for (int t = kFew; t < taps.count; ++t) {
      const float* const from = sums + slot(taps.first + t);
      const float w = taps.weights[t * kLanes];
#pragma unroll 1
      for (int g = place.y; g < tiling.groups; g += place.step) {
#pragma unroll
        for (int j = 0; j < kFour; ++j) {
          tile[(g * kFour + j) * bands.out + place.x] += from[g * tiling.stride + j] * w;
        }
      }
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
  const int width = static_cast<int>(p.columns.out);
  const Place fours(rank, kWarp, tiling.pitch / kFour), column(rank, kWarp, width);
  float* const chunk = reinterpret_cast<float*>(memory + team * tiling.bytes);
  Window* const windows = reinterpret_cast<Window*>(chunk + tiling.windows);
  float *const sums = chunk + tiling.sums, *const tile = chunk;  // the tile takes its place
  const int left = tiling.pixels - rank * kFour;
  bool first = true;
  Column taps;
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
      read_windows(rank, p.rows, row_table, tiling.groups, tiling.pitch, windows);
    }
    if (first || p.columns.index) taps.read(column, p.columns, column_table);
    first = false;
    __syncwarp();
    if (fours.y < fours.step) {
      resample_rows(fours, tiling, windows, chunk, sums);
      if (tiling.more_rows) resample_rows_more(fours, tiling, p.rows, row_table, chunk, sums);
    }
    __syncwarp();
    if (column.y < column.step) {
      taps.resample(column, tiling, width, sums, tile);
      if (tiling.more_columns)
        taps.resample_more(column, tiling, p.columns, column_table, sums, tile);
    }
    __syncwarp();
    const int64_t target = p.to.image(n);
    for (int i = k; i < (mix.planes < mix.out ? mix.out : k + 1); ++i) {
      store_as(p, rank, kWarp, mix, i, Span(p.rows), Span(p.columns), tile, target);
    }
    __syncwarp();
  } while (next.n < p.images);
}

}  // namespace
}  // namespace fused
