// The CUDA kernel of images of any size and layout. A block makes a tile of the target after the
// other: mixed pixels into shared memory, by chunks of rows and columns, and the two passes over
// them. A chunk has a fixed size, so that any image fits.
#pragma once
#include "fused_cuda_passes.h"

namespace fused {
namespace {

// Of a launch; see Tiling for what they bound. Found by simulated cycles on sm_90, of the chain
// Resize(256), CenterCrop(224) of photographs and of 512 -> 224.
constexpr int kTileHeight = 32, kTileBytes = 256;  // of the target: rows, bytes of T in a row
constexpr int kChunkRows = 64, kChunkBytes = 416;  // of the source, in shared memory
constexpr int kBlocksPerProcessor = 8;             // more than are resident
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kResident = 3;  // by registers: with 4, more of the sm_100 code spills
#else
constexpr int kResident = 4;  // with 5, sm_90 code spills
#endif

enum class Load { kPlanes, kInterleaved, kAny };  // whole fours of a row; of RGB pixels; pixels

// A call as the kernel takes it. A tile is the part of the target that a block makes; a chunk the
// part of the source at work. Lengths in pixels, offsets in T.
struct Tiling {
  int height, width, chunk_rows, pitch, sums, tile, windows, bytes;
  unsigned down, across;
  int64_t tiles;
  Load load;
};

// One axis of a tile: `length` output pixels from `begin` on, and the input pixels [low, high)
// that hold all that they see.
struct Span {
  int begin, length, low, high;

  __device__ Span(const Bands& bands, const int32_t* table, int begin, int size)
      : begin(begin), length(min(static_cast<int>(bands.out) - begin, size)) {
    low = static_cast<int>(bands.in), high = 0;
#pragma unroll 4
    for (int o = begin; o < begin + length; o += kHalf) {
      const int32_t* const at = group_at(bands, table, o);
      const HalfGroup& half = reinterpret_cast<const Group*>(at)->halves[o / kHalf % 2];
      const bool none = half.low == half.high;
      low = min(low, none ? low : half.low), high = max(high, none ? high : half.high);
    }
    if (high == 0) low = 0;
  }
};

// Rows [0, rows) of the source into the chunk, mixed, four pixels at a time: `words` planes, or
// the same number of fours of interleaved pixels. `from` is the chunk's first pixel.
template <int words, bool interleaved, typename In, typename T>
__device__ void load_fours(const Place& place, const In* from, const View& view,
                           const Terms<T>& terms, int term, int rows, int pitch, int width,
                           bool add, T* chunk) {
  constexpr int at_once = sizeof(In) == 4 ? 4 : kRowsAtOnce<In>;
  const int x = place.x * kFour;
  if (x >= width) return;
  const int64_t step = place.step * view.row;
  from += place.y * view.row + (interleaved ? x * words : x);
  T w[words];
  const In* at[words];
#pragma unroll
  for (int i = 0; i < words; ++i) {
    w[i] = terms.weight[term + i];
    at[i] = from + (interleaved ? i * kFour : terms.channel[term + i] * view.channel);
  }
  chunk += place.y * pitch + x;
#pragma unroll 1
  for (int y = place.y; y < rows; y += at_once * place.step) {
    Four<In> raw[at_once][words];
#pragma unroll
    for (int j = 0; j < at_once; ++j) {
#pragma unroll
      for (int i = 0; i < words; ++i) {
        if (y + j * place.step < rows) raw[j][i].load(at[i]);
        at[i] += step;
      }
    }
#pragma unroll
    for (int j = 0; j < at_once; ++j, chunk += place.step * pitch) {
      if (y + j * place.step >= rows) break;
      T sum[kFour] = {};
      Four<T> result;
      if (add) result.load(chunk), result.get(sum);
      add_mix<words, interleaved>(raw[j], w, sum);
      result.set(sum);
      result.store(chunk);
    }
  }
}

// The same for any strides.
template <typename In, typename T>
__device__ void load_pixels(const Place& place, const In* from, const View& view, int channel, T w,
                            int rows, int pitch, int width, bool add, T* chunk) {
  const int x = place.x * kFour;
  if (x >= width) return;
  from += channel * view.channel + x * view.column;
  if (kSmall<In, T>) w *= static_cast<T>(1 / kPixel);  // these pixels are converted
#pragma unroll 1
  for (int y = place.y; y < rows; y += place.step) {
    T* const to = chunk + y * pitch + x;
    In pixels[kFour];
#pragma unroll
    for (int q = 0; q < kFour; ++q) {
      if (x + q < width) pixels[q] = from[y * view.row + q * view.column];
    }
#pragma unroll
    for (int q = 0; q < kFour; ++q) {
      if (x + q < width) to[q] = (add ? to[q] : T(0)) + T(pixels[q]) * w;
    }
  }
}

// Channel k of the mixed source into the chunk: rows from y0, columns from x0 on.
template <typename In, typename T>
__device__ void load(const Place& place, const In* source, const View& view, const Tiling& tiling,
                     const Terms<T>& terms, int k, int y0, int rows, int x0, int width, int pitch,
                     T* chunk) {
  const int begin = terms.begin[k], end = terms.begin[k + 1];
  source += y0 * view.row + x0 * view.column;
  if (tiling.load == Load::kInterleaved) {
    load_fours<3, true>(place, source, view, terms, begin, rows, pitch, width, false, chunk);
  } else if (tiling.load == Load::kPlanes && end - begin == 3) {
    load_fours<3, false>(place, source, view, terms, begin, rows, pitch, width, false, chunk);
  } else {
    for (int i = begin; i < end; ++i) {
      if (tiling.load == Load::kPlanes) {
        load_fours<1, false>(place, source, view, terms, i, rows, pitch, width, i > begin, chunk);
      } else {
        load_pixels(place, source, view, terms.channel[i], terms.weight[i], rows, pitch, width,
                    i > begin, chunk);
      }
    }
  }
}

// The threads' places in a chunk, and the column that each makes. A tile that is one chunk keeps
// them for all its channels.
template <typename T>
struct Work {
  Shape shape{kFour, kFour};
  Place fours{0, kThreads, 1}, pixels{0, kThreads, 1};
  Column<false, T> column;
};

// Channel k of the tile, whose origin is at `target`. `kept`: the work is that of the channel
// before.
template <typename In, typename T>
__device__ void resample(const Problem& p, const Terms<T>& terms, const Tiling& tiling, int k,
                         const In* source, const int32_t* row_table, const int32_t* column_table,
                         const Span& rows, const Span& columns, bool kept, Work<T>& work,
                         int64_t target, T* chunk) {
  const int rank = static_cast<int>(threadIdx.x), begin = columns.low / kFour * kFour;
  const bool empty = terms.begin[k] == terms.begin[k + 1];
  T *const sums = chunk + tiling.sums, *const tile = chunk + tiling.tile;
  Window<T>* const windows = reinterpret_cast<Window<T>*>(chunk + tiling.windows);
  int x0 = begin;
  do {
    const int width = min(columns.high - x0, tiling.pitch);
    if (!kept) {
      work.shape = Shape(max((width + kFour - 1) / kFour, 1) * kFour, rows.length);
      work.fours = Place(rank, kThreads, work.shape.pitch / kFour);
      work.pixels = Place(rank, kThreads, columns.length);
      if (work.pixels.y < work.pixels.step) {
        const int x = columns.begin + work.pixels.x;
        work.column.set(p.columns, Taps<T>(p.columns, column_table, x, x0, width));
      }
    }
    const Place& fours = work.fours;
    int y0 = rows.low;
    do {
      const int height = min(rows.high - y0, tiling.chunk_rows);
      if (!empty) {
        load(fours, source, p.from, tiling, terms, k, y0, height, x0, width, work.shape.pitch,
             chunk);
      }
      if (!kept) {
        read_windows<false>(rank, kThreads, p.rows, row_table, rows.begin, rows.length, y0, height,
                            work.shape, windows);
      }
      __syncthreads();
      if (fours.y < fours.step && !empty) {
        resample_rows<false>(fours, p.rows, row_table, rows.begin, y0, height, work.shape, windows,
                             y0 != rows.low, chunk, sums);
      }
      __syncthreads();
      y0 += tiling.chunk_rows;
    } while (y0 < rows.high);
    if (work.pixels.y < work.pixels.step) {
      resample_columns(p, terms, k, work.pixels, work.shape, work.column, rows.length,
                       columns.length, target, sums, x0 != begin, x0 + tiling.pitch < columns.high,
                       tile);
    }
    x0 += tiling.pitch;
  } while (x0 < columns.high);
}

template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : kResident)
    fused_tiles_kernel(Problem p, Terms<T> terms, Tiling tiling) {
  FUSED_SHARED(memory);
  T* const chunk = reinterpret_cast<T*>(memory);

  const unsigned parts = tiling.down * tiling.across;
  unsigned part = blockIdx.x % parts;
  for (int64_t n = blockIdx.x / parts; n < p.images; n += gridDim.x / parts) {
    const int down = static_cast<int>(part / tiling.across);
    const int32_t *row_table = p.rows.table(n), *column_table = p.columns.table(n);
    const Span rows(p.rows, row_table, down * tiling.height, tiling.height);
    const Span columns(p.columns, column_table,
                       static_cast<int>(part % tiling.across) * tiling.width, tiling.width);
    const In* const source = static_cast<const In*>(p.source) + p.from.image(n);
    const int64_t target = p.to.image(n) + rows.begin * p.to.row + columns.begin * p.to.column;
    const bool one = rows.high - rows.low <= tiling.chunk_rows &&
                     columns.high - columns.low / kFour * kFour <= tiling.pitch;
    Work<T> work;
    for (int k = 0; k < terms.planes; ++k) {
      resample(p, terms, tiling, k, source, row_table, column_table, rows, columns, one && k > 0,
               work, target, chunk);
    }
    __syncthreads();
    part += gridDim.x % parts;
    if (part >= parts) part -= parts, ++n;
  }
}

}  // namespace
}  // namespace fused
