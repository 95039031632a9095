// The CUDA kernel of images of any size and layout. A block makes a tile of the target: mixed
// pixels into shared memory, by chunks of rows and columns; the vertical pass; the horizontal pass;
// and the tile out. A chunk has a fixed size, so that any image fits.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <type_traits>

#include "fused.h"

namespace fused {
namespace {

constexpr int kThreads = FUSED_THREADS;
constexpr int kWarp = 32;
constexpr int kFour = 4;  // pixels that a thread moves at once: no bank conflicts, 16 bytes of T
constexpr int kFew = 3;   // taps whose loop is unrolled (and one more): scales up to 1.5, and 2

// Of a launch; see Tiling for what they bound. They are estimates.
constexpr int kTileHeight = 24, kTileBytes = 256;  // of the target: rows, bytes of T in a row
constexpr int kChunkRows = 40, kChunkBytes = 512;  // of the source, in shared memory
constexpr int kShared = 48 * 1024;                 // bytes for a block, without asking for more
constexpr int kBlocksPerProcessor = 8;             // more than are resident

// A thread's place in rows of `width` items, and how many rows the team covers at once.
struct Place {
  int x, y, step;
  __device__ Place(unsigned rank, unsigned size, unsigned width)
      : x(rank % width), y(rank / width), step(size / width) {
    if (y >= step) x = 1 << 28;  // left over
  }
};

// Four neighbouring pixels, moved by instructions of as many bytes, at most 16: the compiler would
// split the copy of a struct into scalars.
template <typename T>
struct Four {
  using Word = std::conditional_t<sizeof(T) == 1, uint32_t,
                                  std::conditional_t<sizeof(T) == 2, uint2, uint4>>;
  static constexpr int words = kFour * sizeof(T) / sizeof(Word);
  Word word[words];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < words; ++i) word[i] = reinterpret_cast<const Word*>(from)[i];
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < words; ++i) reinterpret_cast<Word*>(to)[i] = word[i];
  }
  __device__ void store_global(T* to) const {
#pragma unroll
    for (int i = 0; i < words; ++i) __stwb(reinterpret_cast<Word*>(to) + i, word[i]);
  }
  __device__ void get(T (&pixels)[kFour]) const { memcpy(pixels, word, sizeof(word)); }
  template <typename To>
  __device__ To pixel(int q) const {
    if constexpr (sizeof(T) == 1 && std::is_same<To, float>::value) {
      // 2^23 + x has x as its low bits: cheaper than the conversion's own instruction
      const unsigned bits = __byte_perm(word[0], 0x4b000000u, 0x7440 | q);
      float sum;
      memcpy(&sum, &bits, sizeof(sum));
      return sum - 8388608.f;
    } else {
      T pixels[kFour];
      get(pixels);
      return static_cast<To>(pixels[q]);
    }
  }
  __device__ void set(const T (&pixels)[kFour]) { memcpy(word, pixels, sizeof(word)); }
};

template <typename Out, typename T>
__device__ Out converted(T x) {
  if constexpr (std::is_same<Out, uint8_t>::value) {
    // the sum's low bits hold x, rounded to nearest, ties to even
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    constexpr T whole = sizeof(T) == 8 ? T(6755399441055744.0) : T(12582912.0);
    x = x > 0 ? x : T(0);  // a NaN becomes 0
    x = x < 255 ? x : T(255);
    const T sum = x + whole;
    Bits bits;
    memcpy(&bits, &sum, sizeof(bits));
    return static_cast<uint8_t>(bits);
  } else {
    return static_cast<Out>(x);
  }
}

enum class Load { kPlanes, kInterleaved, kAny };  // whole fours of a row; of RGB pixels; pixels

// A call as the kernel takes it. A tile is a part of the target that a team makes; a chunk the part
// of the source at work. Lengths in pixels, offsets in T.
struct Tiling {
  int height, width, chunk_rows, pitch, sums, tile, bytes;
  int row_taps, column_taps, down, across;
  int64_t tiles;
  Load load;
};

// The mix without its zeros: channel k is a sum over terms[begin[k], begin[k + 1]). Of a single
// channel all others are multiples: it is resampled once and scaled where it is stored.
template <typename T>
struct Terms {
  int in, out, planes;  // planes: how often to resample
  short begin[kMaxChannels + 1];
  unsigned char channel[kMaxChannels * kMaxChannels];
  T weight[kMaxChannels * kMaxChannels];
  T scale[kMaxChannels], bias[kMaxChannels], low[kMaxChannels], high[kMaxChannels];
  bool clamped;
};

// One axis of a tile: `length` output pixels from `begin` on, and the input pixels [low, high)
// that hold all that they see.
struct Span {
  int begin, length, low, high;

  __device__ Span(const Bands& bands, const int32_t* table, int begin, int size)
      : begin(begin), length(min(static_cast<int>(bands.out) - begin, size)) {
    low = static_cast<int>(bands.in), high = 0;
    for (int o = begin / kHalf * kHalf; o < begin + length; o += kHalf) {
      const HalfGroup& half = group_of(table, bands.rows, o).halves[o / kHalf % 2];
      if (half.low == half.high) continue;
      low = min(low, half.low), high = max(high, half.high);
    }
    if (high == 0) low = 0;
  }
  __device__ explicit Span(const Bands& bands)  // all of it
      : begin(0), length(static_cast<int>(bands.out)), low(0), high(static_cast<int>(bands.in)) {}
};

// The taps of output pixel o that lie in the input pixels [begin, begin + length); if whole, all.
template <bool whole, typename T>
struct Taps {
  int first, count;
  const T* weights;  // kLanes apart

  __device__ Taps(const Bands& bands, const int32_t* table, unsigned o, int begin, int length) {
    const int32_t* const at = table + o / kLanes * (static_cast<unsigned>(bands.rows) * kLanes);
    const unsigned lane = o % kLanes;
    first = at[lane] - begin;
    count = at[lane + kLanes];
    weights = reinterpret_cast<const T*>(at + kHeadRows * kLanes) + lane;
    if (whole) return;
    const int before = max(-first, 0);
    first += before;
    count = min(count - before, length - first);
    weights += before * kLanes;
  }
};

// Rows that a thread loads before it computes: bytes in flight, of three planes up to 24 registers.
template <typename In>
constexpr int kRowsAtOnce = 8 / sizeof(In);

// Rows [0, rows) of the source into the chunk, mixed, four pixels at a time: `words` planes, or
// the same number of fours of interleaved pixels. `from` is the chunk's first pixel.
template <int words, bool interleaved, typename In, typename T>
__device__ void load_fours(const Place& place, const In* from, const View& view,
                           const Terms<T>& terms, int term, int rows, int pitch, int width,
                           bool add, T* chunk) {
  constexpr int at_once = kRowsAtOnce<In>;
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
#pragma unroll
      for (int i = 0; i < words; ++i) {
        if (interleaved && w[i] == 0) continue;
#pragma unroll
        for (int q = 0; q < kFour; ++q) {
          const int index = interleaved ? q * words + i : i * kFour + q;
          sum[q] += raw[j][index / kFour].template pixel<T>(index % kFour) * w[i];
        }
      }
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
                     const Terms<T>& terms, int k, int y0, int rows, int x0, int width, T* chunk) {
  const int begin = terms.begin[k], end = terms.begin[k + 1];
  const int pitch = tiling.pitch;
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

// pass(how many taps are unrolled)
template <typename Pass>
__device__ void few_or_more(int taps, const Pass& pass) {
  if (taps <= kFew) {
    pass(std::integral_constant<int, kFew>());
  } else {
    pass(std::integral_constant<int, kFew + 1>());
  }
}

// The vertical pass over the chunk's rows, which begin at y0: into `sums`, a row for each of the
// tile's, or added to it.
template <int few, typename T>
__device__ void resample_rows(const Place& place, const Bands& bands, const int32_t* table,
                              const Span& span, int y0, int rows, int pitch, bool add,
                              const T* chunk, T* sums) {
  if (place.x * kFour >= pitch) return;
  chunk += place.x * kFour, sums += place.x * kFour + place.y * pitch;
#pragma unroll 1
  for (int y = place.y; y < span.length; y += place.step, sums += place.step * pitch) {
    const Taps<false, T> taps(bands, table, span.begin + y, y0, rows);
    const T* from = chunk + taps.first * pitch;
    T sum[kFour] = {};
    Four<T> result;
    if (add) result.load(sums), result.get(sum);
    const auto tap = [&](int t) {
      const T w = taps.weights[t * kLanes];
      Four<T> four;
      T pixels[kFour];
      four.load(from);
      four.get(pixels);
      from += pitch;
#pragma unroll
      for (int q = 0; q < kFour; ++q) sum[q] += pixels[q] * w;
    };
#pragma unroll
    for (int t = 0; t < few; ++t) {
      if (t < taps.count) tap(t);
    }
#pragma unroll 1
    for (int t = few; t < taps.count; ++t) tap(t);
    result.set(sum);
    result.store(sums);
  }
}

// The horizontal pass over the chunk's columns from x0 on: into the tile, or added to it.
template <int few, typename T>
__device__ void resample_columns(const Place& place, const Bands& bands, const int32_t* table,
                                 const Span& span, int x0, int pitch, int height, bool add,
                                 const T* sums, T* tile) {
  if (place.x >= span.length) return;
  const Taps<false, T> taps(bands, table, span.begin + place.x, x0, pitch);
  T weights[few];  // most windows are short: their weights stay in registers
#pragma unroll
  for (int t = 0; t < few; ++t) weights[t] = t < taps.count ? taps.weights[t * kLanes] : T(0);
  sums += taps.first + place.y * pitch, tile += place.x + place.y * span.length;
  const int step = place.step * pitch, to_step = place.step * span.length;
  const auto row = [&](const T* from, T* to) {
    T sum = add ? *to : T(0);
#pragma unroll
    for (int t = 0; t < few; ++t) {
      if (t < taps.count) sum += from[t] * weights[t];
    }
    *to = sum;
  };
  const T* from = sums;
  T* to = tile;
  int y = place.y;
#pragma unroll 1
  for (; y + 3 * place.step < height; y += 4 * place.step, from += 4 * step, to += 4 * to_step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) row(from + j * step, to + j * to_step);
  }
#pragma unroll 1
  for (; y < height; y += place.step, from += step, to += to_step) row(from, to);
  for (int t = few; t < taps.count; ++t) {
    const T w = taps.weights[t * kLanes];
    from = sums + t, to = tile;
#pragma unroll 4
    for (y = place.y; y < height; y += place.step, from += step, to += to_step) *to += *from * w;
  }
}

// Pixels of the tile into channel k of the target: scaled, with the bias, and clamped.
template <typename Out, typename T, int n>
__device__ void finish(const Terms<T>& terms, int k, bool clamped, T (&pixels)[n], Out (&out)[n]) {
  const T scale = terms.scale[k], bias = terms.bias[k];
#pragma unroll
  for (int q = 0; q < n; ++q) pixels[q] = pixels[q] * scale + bias;
  if (clamped) {
    const T low = terms.low[k], high = terms.high[k];
#pragma unroll
    for (int q = 0; q < n; ++q) {
      pixels[q] = pixels[q] < low ? low : pixels[q] > high ? high : pixels[q];
    }
  }
#pragma unroll
  for (int q = 0; q < n; ++q) out[q] = converted<Out>(pixels[q]);
}

// The tile into channel k of the target, whose pixel at the tile's origin is `to`.
template <typename Out, typename T>
__device__ void store(int rank, int size, const View& view, const Terms<T>& terms, int k,
                      int height, int width, const T* tile, Out* to) {
  const bool empty = terms.scale[k] == 0;  // nothing is mixed into this channel
  if (view.column == 1 && view.row == width) width *= height, height = 1;  // one long row
  const unsigned row = static_cast<unsigned>(view.row);
  const unsigned address = static_cast<unsigned>(reinterpret_cast<uintptr_t>(to));
  if (view.column == 1 && width % kFour == 0 && (height == 1 || row % kFour == 0) &&
      address % sizeof(typename Four<Out>::Word) == 0) {
    const int many = width / kFour;
    const auto fours = [&](auto is_plain) {
      constexpr bool plain = decltype(is_plain)::value;
#pragma unroll 1
      for (int i = rank; i < many * height; i += size) {
        Four<T> from;
        Four<Out> result;
        T pixels[kFour] = {};
        Out out[kFour];
        if (plain || !empty) from.load(tile + i * kFour), from.get(pixels);
        finish(terms, k, !plain && terms.clamped, pixels, out);
        result.set(out);
        int64_t at = int64_t{i} * kFour;
        if (!plain && height > 1) at = i / many * view.row + i % many * kFour;
        result.store_global(to + at);
      }
    };
    if (height == 1 && !empty && !terms.clamped) {
      fours(std::true_type());
    } else {
      fours(std::false_type());
    }
    return;
  }
#pragma unroll 1
  for (int i = rank; i < width * height; i += size) {
    T pixel[1] = {empty ? T(0) : tile[i]};
    Out out[1];
    finish(terms, k, terms.clamped, pixel, out);
    const int y = height == 1 ? 0 : i / width;
    to[y * view.row + (i - y * width) * view.column] = out[0];
  }
}

// Channel k of the mixed source, resampled, into the tile.
template <typename In, typename T>
__device__ void resample(const Place& fours, const Place& pixels, const Problem& p,
                         const Terms<T>& terms, const Tiling& tiling, int k, const In* source,
                         const int32_t* row_table, const int32_t* column_table, const Span& rows,
                         const Span& columns, T* chunk) {
  const int pitch = tiling.pitch, begin = columns.low / kFour * kFour;
  T *const sums = chunk + tiling.sums, *const tile = chunk + tiling.tile;
  int x0 = begin;
  do {
    int y0 = rows.low;
    do {
      const int height = min(rows.high - y0, tiling.chunk_rows);
      load(fours, source, p.from, tiling, terms, k, y0, height, x0,
           static_cast<int>(p.columns.in) - x0, chunk);
      __syncthreads();
      few_or_more(tiling.row_taps, [&](auto few) {
        resample_rows<decltype(few)::value>(fours, p.rows, row_table, rows, y0, height, pitch,
                                            y0 != rows.low, chunk, sums);
      });
      __syncthreads();
      y0 += tiling.chunk_rows;
    } while (y0 < rows.high);
    few_or_more(tiling.column_taps, [&](auto few) {
      resample_columns<decltype(few)::value>(pixels, p.columns, column_table, columns, x0, pitch,
                                             rows.length, x0 != begin, sums, tile);
    });
    x0 += pitch;
  } while (x0 < columns.high);
  __syncthreads();
}

template <typename T>
__device__ void store_as(const Problem& p, int rank, int size, const Terms<T>& terms, int k,
                         const Span& rows, const Span& columns, const T* tile, int64_t image) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const int64_t at = image + rows.begin * p.to.row + columns.begin * p.to.column + k * p.to.channel;
  const auto as = [&](auto* target) {
    store(rank, size, p.to, terms, k, rows.length, columns.length, tile, target + at);
  };
  if (p.to_type == ScalarType::Float) return as(static_cast<float*>(p.target));
  if (p.to_type == ScalarType::Byte) return as(static_cast<uint8_t*>(p.target));
  if (p.to_type == ScalarType::Half) return as(static_cast<Half*>(p.target));
  if (p.to_type == ScalarType::BFloat16) return as(static_cast<BFloat16*>(p.target));
  if constexpr (std::is_same<T, double>::value) as(static_cast<double*>(p.target));
}

template <typename In, typename T>
__global__ void __launch_bounds__(kThreads, 4)
    fused_separable_map_kernel(Problem p, Terms<T> terms, Tiling tiling) {
  FUSED_SHARED(memory);
  const int rank = static_cast<int>(threadIdx.x);
  const Place fours(rank, kThreads, tiling.pitch / kFour), pixels(rank, kThreads, tiling.width);
  T* const chunk = reinterpret_cast<T*>(memory);

  for (int64_t index = blockIdx.x; index < tiling.tiles; index += gridDim.x) {
    const int parts = tiling.down * tiling.across;
    const int64_t n = index / parts;
    const int part = static_cast<int>(index - n * parts), down = part / tiling.across;
    const int32_t *row_table = p.rows.table(n), *column_table = p.columns.table(n);
    const Span rows(p.rows, row_table, down * tiling.height, tiling.height);
    const Span columns(p.columns, column_table, (part - down * tiling.across) * tiling.width,
                       tiling.width);
    const In* const source = static_cast<const In*>(p.source) + p.from.image(n);
    const int64_t target = p.to.image(n);
    for (int k = 0; k < terms.planes; ++k) {
      if (terms.begin[k] < terms.begin[k + 1]) {
        resample(fours, pixels, p, terms, tiling, k, source, row_table, column_table, rows, columns,
                 chunk);
      }
      for (int i = k; i < (terms.planes < terms.out ? terms.out : k + 1); ++i) {
        store_as(p, rank, kThreads, terms, i, rows, columns, chunk + tiling.tile, target);
      }
      __syncthreads();
    }
  }
}

}  // namespace
}  // namespace fused
