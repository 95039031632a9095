// What the CPU kernel's files share: how the work is laid out, and what its passes are told.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "fused.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_X86
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace fused {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kRows = 7;  // rows of sums that fit into 16 or 32 registers; divides 28 and 224

// A task of fewer pixels than this costs more to hand to a thread than to do.
constexpr int64_t kTaskPixels = 1 << 15;
// A result of kStreamBytes is evicted before it is read, so it is stored past the caches. Rows need
// no copy for that, so they are stored past the second-level cache from kStreamRowBytes on: to read
// their lines first would cost more than the reader of the result gains from the third level.
constexpr int64_t kStreamBytes = 1 << 23, kStreamRowBytes = 1 << 19;
// A plane that is staged must leave room in the first-level cache.
constexpr int64_t kStageBytes = 1 << 14;
// Rows end to end are loaded together as far as the ring holds them.
constexpr int64_t kRingPixels = 2048;
// What the first-level cache holds of the rows of one channel.
constexpr int64_t kBlockPixels = 4096;
// An image of up to this size is asked for while the one before it is worked on.
constexpr int64_t kAheadBytes = 1 << 16;
// Rows of a crop are asked for so early: the processor's own prefetching follows whole rows only.
constexpr int64_t kAheadRows = 8;

constexpr int64_t whole(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

int64_t size_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

struct Range {
  int64_t low, high;
};

int64_t first_of(const Bands& bands, const int32_t* table, int64_t o) {
  return group_of(table, bands.rows, o).first[o % kLanes];
}

// What the output pixels [begin, end) see.
Range range_of(const Bands& bands, const int32_t* table, int64_t begin, int64_t end) {
  Range range{bands.in, 0};
  for (int64_t o = begin; o < end;) {
    const Group& group = group_of(table, bands.rows, o);
    const int lane = o % kLanes, half = lane / kHalf;
    int64_t low = group.first[lane], high = low + group.count[lane], more = 1;
    if (lane % kHalf == 0 && (end - o >= kHalf || end == bands.out)) {  // lanes behind repeat
      low = group.halves[half].low, high = group.halves[half].high, more = kHalf;
    }
    if (low < high) range = {std::min(range.low, low), std::max(range.high, high)};
    o += more;
  }
  return range.low < range.high ? range : Range{0, 0};
}

// What all output pixels see.
Range range_of(const Bands& bands, const int32_t* table) {
  return range_of(bands, table, 0, bands.out);
}

#ifdef FUSED_X86
HalfGroup joined(const HalfGroup& a, const HalfGroup& b) {
  const int32_t low = std::min(a.low, b.low);
  return {low,
          std::max(a.high, b.high),
          std::min(a.least, b.least),
          std::max(a.most, b.most),
          std::max(a.low + a.spread, b.low + b.spread) - low,
          0,
          {}};
}

// For every four output pixels, the start of 16 bytes within [low, high) that hold what they read.
void places_of(const Bands& bands, const int32_t* table, int32_t low, int32_t high,
               int32_t* places) {
  for (int64_t o = 0; o < bands.out; o += kHalf) {
    const Group& group = group_of(table, bands.rows, o);
    for (int quad = 0; quad < 2; ++quad) {
      int32_t place = high - 16;
      for (int i = 0; i < 4; ++i) {
        const int lane = o % kLanes + 4 * quad + i;
        if (group.count[lane] > 0) place = std::min(place, group.first[lane]);
      }
      *places++ = std::max(place, low);
    }
  }
}

// Whether 16 bytes hold what every four output pixels read.
bool are_near(const Bands& bands, const int32_t* table) {
  for (int64_t quad = 0; quad < 4 * bands.groups; ++quad) {
    const Group& group = group_of(table, bands.rows, quad / 4 * kLanes);
    int32_t low = std::numeric_limits<int32_t>::max(), high = 0;
    for (int64_t lane = quad % 4 * 4; lane < quad % 4 * 4 + 4; ++lane) {
      if (group.count[lane] == 0) continue;
      low = std::min(low, group.first[lane]);
      high = std::max(high, group.first[lane] + group.count[lane]);
    }
    if (high - low > 16 && high > 0) return false;
  }
  return true;
}
#endif

// Lengths in elements of T, for all images of a call.
struct Layout {
  enum { kGeneral, kFloats, kBytes } path;  // fused_cpu_kernel.inc, or those of fused_cpu_rows.inc
  int64_t block;                            // output rows at a time
  int64_t planar, planar_rows;              // room for rows of one channel, end to end
  int64_t shuffles;                         // room for what kBytes prepares
  int64_t sums;                             // room for a RowSum of each row and channel
  int64_t pitch, ring;  // of a row; rows in the ring of a channel, a power of two
  int64_t scratch;
  enum { kNone, kRow, kPlane } stream;  // what is staged and then written past the caches
};

template <typename T>
struct Ring {
  T* memory;
  int64_t mask, pitch;
  T* row(int64_t y) const { return memory + (y & mask) * pitch; }
};

// How one row of the result is made of rows in the ring: prepared once for all images that have the
// same table.
struct RowSum {
  int64_t at;     // where those rows begin in the ring
  int32_t count;  // kMany: more than four, none, or not end to end
  float weights[4];
};
constexpr int32_t kMany = 5;

// What one thread does: parts of images, `height` output rows each.
struct Tasks {
  int64_t begin, end, parts, height, rows;
  int64_t image(int64_t task) const { return task / parts; }
  int64_t first(int64_t task) const { return task % parts * height; }
  int64_t last(int64_t task) const { return std::min(first(task) + height, rows); }
};

// A row of the mix without its zeros; offsets in elements.
template <typename T>
struct Terms {
  int count = 0;
  bool interleaved = false;  // offsets are those of RGB pixels
  int64_t offset[kMaxChannels];
  T weight[kMaxChannels];
  Terms() = default;
  Terms(const Mix<T>& mix, int k, int64_t channel) : interleaved(channel == 1 && mix.in == 3) {
    for (int c = 0; c < mix.in; ++c) {
      const T w = mix.mix[k * mix.in + c];
      if (w != 0) offset[count] = c * channel, weight[count++] = w;
    }
  }
};

// Where the bytes of a channel lie among 16 RGB pixels in three registers: which ones to take from
// the second, from the third, and the places of all 16 in order.
struct Interleaved {
  alignas(16) int8_t masks[48];
  constexpr explicit Interleaved(int channel) : masks() {
    for (int i = 0; i < 32; ++i) masks[i] = (i + 16) % 3 == channel ? -1 : 0;
    for (int i = 0; i < 16; ++i) masks[32 + i] = static_cast<int8_t>((3 * i + channel) % 16);
  }
};
#ifdef FUSED_X86
constexpr Interleaved kInterleaved[3] = {Interleaved(0), Interleaved(1), Interleaved(2)};
#endif

template <typename T>
using Loader = void (*)(const void* source, int64_t column, const Terms<T>& terms, int64_t n,
                        T* to);
template <typename T>
using Storer = void (*)(const T* from, void* target, int64_t column, int64_t n);

template <typename T>
void clamp(T* row, int64_t n, T low, T high) {  // a NaN stays
  for (int64_t i = 0; i < n; ++i) row[i] = row[i] < low ? low : row[i] > high ? high : row[i];
}

template <typename Out, typename T>
inline Out converted(T x) {
  if constexpr (std::is_same<Out, uint8_t>::value) {
    // the sum has no bits left for a fraction: rounded to nearest, ties to even
    constexpr T whole = sizeof(T) == 8 ? T(6755399441055744.0) : T(12582912.0);
    x = x > 0 ? x : T(0);  // a NaN becomes 0
    x = x < 255 ? x : T(255);
    return static_cast<uint8_t>(static_cast<int32_t>((x + whole) - whole));
  } else {
    return static_cast<Out>(x);
  }
}

}  // namespace
}  // namespace fused
