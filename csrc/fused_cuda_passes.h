// What the CUDA kernels have in common: the two passes over mixed pixels in shared memory, and the
// way out. A team of threads makes a tile of the target: the vertical pass into `sums`, four rows
// of four columns at a time; the horizontal pass, four rows of a column at a time, and out.
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

// Whether pixels of `In` are summed 2^133 times too small. A float whose bits are x << 16, for an x
// below 256, is x * 2^-133, subnormal or not: that takes one instruction, and a conversion two. The
// weights make up for most of it, the scale of the result for kSum. With -ftz=true it would be 0.
template <typename In, typename T>
constexpr bool kSmall = sizeof(In) == 1 && std::is_same<T, float>::value;
constexpr double kPixel = 0x1p133, kSum = 0x1p64;

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
  __device__ void get(T (&pixels)[kFour]) const { memcpy(pixels, word, sizeof(word)); }
  template <typename To>
  __device__ To pixel(int q) const {
    if constexpr (kSmall<T, To>) {
      const unsigned bits = __byte_perm(word[0], 0, 0x4044 | q << 8);
      To small;
      memcpy(&small, &bits, sizeof(small));
      return small;
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
    const T sum = (x > 0 ? x < 255 ? x : T(255) : T(0)) + whole;  // a NaN becomes 0
    Bits bits;
    memcpy(&bits, &sum, sizeof(bits));
    return static_cast<uint8_t>(bits);
  } else {
    return static_cast<Out>(x);
  }
}

// The mix: output channel k sums the terms [begin[k], begin[k + 1]), without zeros unless pixels
// are interleaved. A single input channel is resampled once, and scaled where it is stored.
template <typename T>
struct Terms {
  int in, out, planes;  // planes: how often to resample
  short begin[kMaxChannels + 1];
  unsigned char channel[kMaxChannels * kMaxChannels];
  T weight[kMaxChannels * kMaxChannels];
  T scale[kMaxChannels], bias[kMaxChannels], low[kMaxChannels], high[kMaxChannels];
  bool clamped, plain;  // plain: no channel of the result is clamped or has a scale of 0
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

// The group of output pixel o in a table, of 32-bit arithmetic.
__device__ inline const int32_t* group_at(const Bands& bands, const int32_t* table, unsigned o) {
  return table + o / kLanes * (static_cast<unsigned>(bands.rows) * kLanes);
}

// How many weights a table of 32-bit weights stores for each pixel.
__device__ inline int room(const Bands& bands) { return static_cast<int>(bands.rows) - kHeadRows; }

// The taps of output pixel o.
template <typename T>
struct Taps {
  int first, count;
  const T* weights;  // kLanes apart

  __device__ Taps(const Bands& bands, const int32_t* table, unsigned o) {
    const int32_t* const at = group_at(bands, table, o);
    const unsigned lane = o % kLanes;
    first = at[lane], count = at[lane + kLanes];
    weights = reinterpret_cast<const T*>(at + kHeadRows * kLanes) + lane;
  }
  // Only the taps that lie in the input pixels [begin, begin + length).
  __device__ Taps(const Bands& bands, const int32_t* table, unsigned o, int begin, int length) {
    const int32_t* const at = group_at(bands, table, o);
    const unsigned lane = o % kLanes;
    first = at[lane] - begin;
    const int before = max(-first, 0);
    first += before;
    count = min(at[lane + kLanes] - before, length - first);  // below 0: none
    weights = reinterpret_cast<const T*>(at + kHeadRows * kLanes) + before * kLanes + lane;
  }
  // The first kFew weights, 0 behind the last. With `few`, the table stores `room` <= kFew weights
  // for each pixel: they are loaded before the count is known.
  template <bool few>
  __device__ void read(int room, T (&to)[kFew]) const {
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
      const T weight = t < (few ? room : count) ? weights[t * kLanes] : T(0);
      to[t] = t < count ? weight : T(0);
    }
  }
};

// A tile in shared memory, in T: the pitch of its mixed rows; how many groups of four rows the
// vertical pass makes, and the pitch of these, of which `spare` columns stay free.
struct Shape {
  int pitch, groups, stride;

  FUSED_HD Shape(int pitch, int height, int spare = 0)
      : pitch(pitch),
        groups((height + kFour - 1) / kFour),
        stride(slot(pitch + spare - 1) + kFour) {}
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

// `few`, below: no pixel of the target has more than kFew taps, so its window or column holds all
// weights. Its first tap is always added; of a pixel without taps, this is a 0 with weight 0.

// The windows of rows [begin, begin + height) of the target, as far as they lie in the source's
// rows [y0, y0 + rows), for whole groups. With `few` these rows hold all that is seen, and `zeros`
// is the head of a window on a row of zeros.
template <bool few, typename T>
__device__ void read_windows(int rank, int size, const Bands& bands, const int32_t* table,
                             int begin, int height, int y0, int rows, const Shape& shape,
                             Window<T>* windows, unsigned zeros = 0) {
#pragma unroll 1
  for (int y = rank; y < shape.groups * kFour; y += size) {
    Window<T> window{few ? zeros : 0};
    if (y < height) {
      const Taps<T> taps =
          few ? Taps<T>(bands, table, begin + y) : Taps<T>(bands, table, begin + y, y0, rows);
      taps.template read<few>(room(bands), window.weights);
      if (taps.count > 0) {
        window.head = static_cast<unsigned>(taps.count) << kCountShift | taps.first * shape.pitch;
      }
    }
    windows[y] = window;
  }
}

// The vertical pass, over the rows that `read_windows` was told of. The four rows of a column lie
// side by side afterwards, so that the horizontal pass reads them at once.
template <bool few, typename T>
__device__ void resample_rows(const Place& place, const Bands& bands, const int32_t* table,
                              int begin, int y0, int rows, const Shape& shape,
                              const Window<T>* windows, bool add, const T* mixed, T* sums) {
  mixed += place.x * kFour;
#pragma unroll 1
  for (int g = place.y; g < shape.groups; g += place.step) {
    T sum[kFour][kFour] = {};
    const auto add_row = [&](int j, const T* from, T weight) {
      Four<T> four;
      T pixels[kFour];
      four.load(from);
      four.get(pixels);
#pragma unroll
      for (int q = 0; q < kFour; ++q) sum[q][j] += pixels[q] * weight;
    };
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
        if ((few && t == 0) || window.head >= (t + 1) << kCountShift) {
          add_row(j, from, window.weights[t]);
        }
      }
      if (few || window.head < (kFew + 1u) << kCountShift) continue;
      const Taps<T> taps(bands, table, begin + g * kFour + j, y0, rows);
#pragma unroll 1
      for (int t = kFew; t < taps.count; ++t, from += shape.pitch) {
        add_row(j, from, taps.weights[t * kLanes]);
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

// The horizontal pass, of the column of the target that a thread makes.
template <bool few, typename T>
struct Column {
  int first, count, at[kFew];
  T weights[kFew];
  const T* more;  // weights

  // `zeros`: with `few`, the index of a column of zeros in the sums.
  __device__ void set(const Bands& bands, const Taps<T>& taps, int zeros = 0) {
    taps.template read<few>(room(bands), weights);
    first = taps.first, count = taps.count, more = taps.weights;
    if (few && count <= 0) first = zeros;
#pragma unroll
    for (int t = 0; t < kFew; ++t) at[t] = Shape::slot(first + t);
  }

  // Calls use(row, sums of the four rows from it on).
  template <typename Use>
  __device__ void resample(const Place& place, const Shape& shape, int count, const T* sums,
                           Use use) const {
    sums += place.y * shape.stride;
#pragma unroll 1
    for (int g = place.y; g < shape.groups; g += place.step) {
      T sum[kFour] = {};
      const auto add_column = [&](int at, T weight) {
        Four<T> four;
        T pixels[kFour];
        four.load(sums + at);
        four.get(pixels);
#pragma unroll
        for (int j = 0; j < kFour; ++j) sum[j] += pixels[j] * weight;
      };
#pragma unroll
      for (int t = 0; t < kFew; ++t) {
        if ((few && t == 0) || t < count) add_column(at[t], weights[t]);
      }
#pragma unroll 1
      for (int t = kFew; !few && t < count; ++t) {
        add_column(Shape::slot(first + t), more[t * kLanes]);
      }
      use(g * kFour, sum);
      sums += place.step * shape.stride;
    }
  }
};

// Four rows of a column into channel k of the target, from `to` on, as far as there are rows:
// scaled, with the bias, and clamped. The threads of a warp have neighbouring columns. `plain`:
// neither clamped nor a scale of 0, which says that the sum is no part of the channel.
template <bool plain, typename Out, typename T>
__device__ void store(const Terms<T>& terms, int k, T scale, T bias, int64_t row, int rows,
                      const T (&sum)[kFour], Out* to) {
  T pixels[kFour];
#pragma unroll
  for (int j = 0; j < kFour; ++j) {
    pixels[j] = !plain && scale == 0 ? bias : sum[j] * scale + bias;
  }
  if (!plain && terms.clamped) {
    const T low = terms.low[k], high = terms.high[k];
#pragma unroll
    for (int j = 0; j < kFour; ++j) {
      pixels[j] = pixels[j] < low ? low : pixels[j] > high ? high : pixels[j];
    }
  }
  if (rows >= kFour) {
#pragma unroll
    for (int j = 0; j < kFour; ++j, to += row) *to = converted<Out>(pixels[j]);
    return;
  }
#pragma unroll 1
  for (int j = 0; j < rows; ++j, to += row) {
    *to = converted<Out>(j == 0 ? pixels[0] : j == 1 ? pixels[1] : pixels[2]);
  }
}

// Calls step(to), where `to` points to element `at` of the target, in the target's type.
template <typename T, typename Step>
__device__ void with_target(const Problem& p, int64_t at, Step step) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (p.to_type == ScalarType::Float) return step(static_cast<float*>(p.target) + at);
  if (p.to_type == ScalarType::Byte) return step(static_cast<uint8_t*>(p.target) + at);
  if (p.to_type == ScalarType::Half) return step(static_cast<Half*>(p.target) + at);
  if (p.to_type == ScalarType::BFloat16) return step(static_cast<BFloat16*>(p.target) + at);
  if constexpr (std::is_same<T, double>::value) step(static_cast<double*>(p.target) + at);
}

// The horizontal pass of mixed channel k and the way out, from the pixel at `at` of channel 0 on.
// `before`, `after`: what other chunks of these rows have added, or will add, lies in the tile.
template <bool few, typename T>
__device__ void resample_columns(const Problem& p, const Terms<T>& terms, int k, const Place& place,
                                 const Shape& shape, const Column<few, T>& column, int height,
                                 int width, int64_t at, const T* sums, bool before = false,
                                 bool after = false, T* tile = nullptr) {
  const int count = terms.begin[k] < terms.begin[k + 1] ? column.count : 0;
  const int copies = terms.planes < terms.out ? terms.out : 1;
  const int64_t row = p.to.row, step = place.step * kFour * row;
  const T scale = terms.scale[k], bias = terms.bias[k];
  at += place.y * kFour * row + place.x * p.to.column + k * p.to.channel;
  with_target<T>(p, at, [&](auto* to) {
    const auto plain = [&](int y, T(&sum)[kFour]) {
      store<true>(terms, k, scale, bias, row, height - y, sum, to);
#pragma unroll 1
      for (int i = 1; i < copies; ++i) {
        store<true>(terms, i, terms.scale[i], terms.bias[i], row, height - y, sum,
                    to + i * p.to.channel);
      }
      to += step;
    };
    const auto any = [&](int y, T(&sum)[kFour]) {
      T* const kept = tile + y * width + place.x;
#pragma unroll
      for (int j = 0; j < kFour; ++j) {
        if (before) sum[j] += kept[j * width];
        if (after) kept[j * width] = sum[j];
      }
      for (int i = 0; i < copies && !after; ++i) {
        store<false>(terms, k + i, terms.scale[k + i], terms.bias[k + i], row, height - y, sum,
                     to + i * p.to.channel);
      }
      to += step;
    };
    if (before || after || !terms.plain) {
      column.resample(place, shape, count, sums, any);
    } else {
      column.resample(place, shape, count, sums, plain);
    }
  });
}

}  // namespace
}  // namespace fused
