// What the CUDA kernels have in common: the two passes over mixed pixels in shared memory, and the
// way out. A team of threads makes a tile of the target: the vertical pass into `sums`, four rows
// of four columns at a time; the horizontal pass, four rows at a time, into `tile`; and that out.
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
constexpr int kFew = 3;   // taps whose weights are kept at hand: scales up to 1.5, and 2
constexpr int kShared = 48 * 1024;                // bytes for a block, without asking for more
constexpr int kCountShift = 24, kMaxCount = 255;  // of Window::head

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

// Fours that a thread loads before it computes: bytes in flight, of three planes 24 registers.
template <typename In>
constexpr int kRowsAtOnce = sizeof(In) < 8 ? 8 / sizeof(In) : 1;

// The mix of four pixels, added: `terms` planes, or the same number of fours of interleaved pixels.
template <int terms, bool interleaved, typename In, typename T>
__device__ void add_mix(const Four<In> (&fours)[terms], const T (&w)[terms], T (&sum)[kFour]) {
#pragma unroll
  for (int i = 0; i < terms; ++i) {
    if (interleaved && w[i] == 0) continue;
#pragma unroll
    for (int q = 0; q < kFour; ++q) {
      const int index = interleaved ? q * terms + i : i * kFour + q;
      sum[q] += fours[index / kFour].template pixel<T>(index % kFour) * w[i];
    }
  }
}

// The taps of output pixel o that lie in the input pixels [begin, begin + length).
template <typename T>
struct Taps {
  int first, count;
  const T* weights;  // kLanes apart

  __device__ Taps(const Bands& bands, const int32_t* table, unsigned o, int begin, int length) {
    const int32_t* const at = table + o / kLanes * (static_cast<unsigned>(bands.rows) * kLanes);
    const unsigned lane = o % kLanes;
    first = at[lane] - begin;
    const int before = max(-first, 0);
    first += before;
    count = min(at[lane + kLanes] - before, length - first);  // below 0: none
    weights = reinterpret_cast<const T*>(at + kHeadRows * kLanes) + before * kLanes + lane;
  }
};

// A tile in shared memory, in T: the pitch of its mixed rows; how many groups of four rows the
// vertical pass makes, and the pitch of these.
struct Shape {
  int pitch, groups, stride;

  FUSED_HD Shape(int pitch, int height)
      : pitch(pitch), groups((height + kFour - 1) / kFour), stride(slot(pitch - 1) + kFour) {}
  // Where the four rows of column c are in a group. The gap after every eight columns spreads the
  // stores of a warp over the banks.
  FUSED_HD static int slot(int c) { return (c + c / 8) * kFour; }
};

// What an output row sees of the mixed rows: where the first is, and the first weights.
template <typename T>
struct alignas(4 * sizeof(T)) Window {
  unsigned head;  // count << kCountShift | its offset
  T weights[kFew];
};

// The windows of rows [begin, begin + height) of the target, as far as they lie in the source's
// rows [y0, y0 + rows), for whole groups.
template <typename T>
__device__ void read_windows(int rank, int size, const Bands& bands, const int32_t* table,
                             int begin, int height, int y0, int rows, const Shape& shape,
                             Window<T>* windows) {
#pragma unroll 1
  for (int y = rank; y < shape.groups * kFour; y += size) {
    Window<T> window{};
    if (y < height) {
      const Taps<T> taps(bands, table, begin + y, y0, rows);
      if (taps.count > 0) {
        window.head = static_cast<unsigned>(taps.count) << kCountShift | taps.first * shape.pitch;
      }
#pragma unroll
      for (int t = 0; t < kFew; ++t) {
        if (t < taps.count) window.weights[t] = taps.weights[t * kLanes];
      }
    }
    windows[y] = window;
  }
}

// The vertical pass. The four rows of a column lie side by side afterwards, so that the horizontal
// pass reads them at once.
template <typename T>
__device__ void resample_rows(const Place& place, const Shape& shape, const Window<T>* windows,
                              bool add, const T* mixed, T* sums) {
  mixed += place.x * kFour;
#pragma unroll 1
  for (int g = place.y; g < shape.groups; g += place.step) {
    T sum[kFour][kFour] = {};
    if (add) {
#pragma unroll
      for (int q = 0; q < kFour; ++q) {
        Four<T> before;
        before.load(sums + g * shape.stride + Shape::slot(place.x * kFour + q));
        before.get(sum[q]);
      }
    }
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      const Window<T> window = windows[g * kFour + j];
      const T* from = mixed + window.head % (1u << kCountShift);
#pragma unroll
      for (unsigned t = 0; t < kFew; ++t, from += shape.pitch) {
        if (window.head < (t + 1) << kCountShift) continue;
        Four<T> four;
        T pixels[kFour];
        four.load(from);
        four.get(pixels);
#pragma unroll
        for (int q = 0; q < kFour; ++q) sum[q][j] += pixels[q] * window.weights[t];
      }
    }
#pragma unroll
    for (int q = 0; q < kFour; ++q) {
      Four<T> result;
      result.set(sum[q]);
      result.store(sums + g * shape.stride + Shape::slot(place.x * kFour + q));
    }
  }
}

// The taps beyond the first, added: of the same rows as in read_windows.
template <typename T>
__device__ void resample_rows_more(const Place& place, const Bands& bands, const int32_t* table,
                                   int begin, int height, int y0, int rows, const Shape& shape,
                                   const T* mixed, T* sums) {
  const int x = place.x * kFour;
#pragma unroll 1
  for (int g = place.y; g < shape.groups; g += place.step) {
#pragma unroll 1
    for (int j = 0; j < kFour && g * kFour + j < height; ++j) {
      const Taps<T> taps(bands, table, begin + g * kFour + j, y0, rows);
#pragma unroll 1
      for (int t = kFew; t < taps.count; ++t) {
        const T* const from = mixed + (taps.first + t) * shape.pitch + x;
        const T w = taps.weights[t * kLanes];
#pragma unroll
        for (int q = 0; q < kFour; ++q) {
          sums[g * shape.stride + Shape::slot(x + q) + j] += from[q] * w;
        }
      }
    }
  }
}

// The horizontal pass, of the column of the target that a thread makes.
template <typename T>
struct Column {
  int count, at[kFew];
  T weights[kFew];

  __device__ void set(const Taps<T>& taps) {
    count = taps.count;
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
      weights[t] = t < count ? taps.weights[t * kLanes] : T(0);
      at[t] = Shape::slot(taps.first + t);
    }
  }

  __device__ void resample(const Place& place, const Shape& shape, int width, bool add,
                           const T* sums, T* tile) const {
    sums += place.y * shape.stride, tile += place.y * kFour * width + place.x;
#pragma unroll 1
    for (int g = place.y; g < shape.groups; g += place.step) {
      T sum[kFour] = {};
      if (add) {
#pragma unroll
        for (int j = 0; j < kFour; ++j) sum[j] = tile[j * width];
      }
#pragma unroll
      for (int t = 0; t < kFew; ++t) {
        if (t >= count) continue;
        Four<T> four;
        T pixels[kFour];
        four.load(sums + at[t]);
        four.get(pixels);
#pragma unroll
        for (int j = 0; j < kFour; ++j) sum[j] += pixels[j] * weights[t];
      }
#pragma unroll
      for (int j = 0; j < kFour; ++j) tile[j * width] = sum[j];
      sums += place.step * shape.stride, tile += place.step * kFour * width;
    }
  }
};

// The taps beyond the first, added.
template <typename T>
__device__ void resample_columns_more(const Place& place, const Taps<T>& taps, const Shape& shape,
                                      int width, const T* sums, T* tile) {
#pragma unroll 1
  for (int t = kFew; t < taps.count; ++t) {
    const T* const from = sums + Shape::slot(taps.first + t);
    const T w = taps.weights[t * kLanes];
#pragma unroll 1
    for (int g = place.y; g < shape.groups; g += place.step) {
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        tile[(g * kFour + j) * width + place.x] += from[g * shape.stride + j] * w;
      }
    }
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

// The tile into channel k of the target, whose pixel at the tile's origin is `to`. `width` is at
// most `size`.
template <typename Out, typename T>
__device__ void store(int rank, int size, const View& view, const Terms<T>& terms, int k,
                      int height, int width, const T* tile, Out* to) {
  const bool plain = terms.scale[k] != 0 && !terms.clamped;  // 0: nothing is mixed into it
  const unsigned row = static_cast<unsigned>(view.row);
  const unsigned address = static_cast<unsigned>(reinterpret_cast<uintptr_t>(to));
  const bool one = view.column == 1 && view.row == width;  // one long row
  const auto four = [&](auto is_plain, int at, Out* target) {
    constexpr bool simple = decltype(is_plain)::value;
    Four<T> from;
    Four<Out> result;
    T pixels[kFour] = {};
    Out out[kFour];
    if (simple || terms.scale[k] != 0) from.load(tile + at), from.get(pixels);
    finish(terms, k, !simple && terms.clamped, pixels, out);
    result.set(out);
    result.store_global(target);
  };
  const auto fours = [&](auto is_plain) {
    if (one) {
#pragma unroll 1
      for (int i = rank * kFour; i < width * height; i += size * kFour) four(is_plain, i, to + i);
      return;
    }
    const Place place(rank, size, width / kFour);
    to += place.y * view.row + place.x * kFour;
#pragma unroll 1
    for (int y = place.y; y < height && place.y < place.step; y += place.step) {
      four(is_plain, y * width + place.x * kFour, to);
      to += place.step * view.row;
    }
  };
  if (view.column == 1 && width % kFour == 0 && (one || row % kFour == 0) &&
      address % sizeof(typename Four<Out>::Word) == 0) {
    return plain ? fours(std::true_type()) : fours(std::false_type());
  }
  const Place place(rank, size, width);
  to += place.y * view.row + place.x * view.column;
#pragma unroll 1
  for (int y = place.y; y < height && place.y < place.step; y += place.step) {
    T pixel[1] = {terms.scale[k] != 0 ? tile[y * width + place.x] : T(0)};
    Out out[1];
    finish(terms, k, terms.clamped, pixel, out);
    to[0] = out[0];
    to += place.step * view.row;
  }
}

// `at`: where the tile's origin is in channel 0 of the target.
template <typename T>
__device__ void store_as(const Problem& p, int rank, int size, const Terms<T>& terms, int k,
                         int height, int width, const T* tile, int64_t at) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  const auto as = [&](auto* target) {
    store(rank, size, p.to, terms, k, height, width, tile, target + at + k * p.to.channel);
  };
  if (p.to_type == ScalarType::Float) return as(static_cast<float*>(p.target));
  if (p.to_type == ScalarType::Byte) return as(static_cast<uint8_t*>(p.target));
  if (p.to_type == ScalarType::Half) return as(static_cast<Half*>(p.target));
  if (p.to_type == ScalarType::BFloat16) return as(static_cast<BFloat16*>(p.target));
  if constexpr (std::is_same<T, double>::value) as(static_cast<double*>(p.target));
}

}  // namespace
}  // namespace fused
