// The CPU kernel: the work in tasks over the threads, and code for the widest vectors that the
// processor has when it runs.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <type_traits>

#include "fused.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_X86
#include <immintrin.h>
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
  enum { kGeneral, kFloats, kBytes } path;  // fused_cpu_kernel.inc, or one of fused_cpu_simd.inc
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

namespace baseline {
#include "fused_cpu_kernel.inc"
}

#ifdef FUSED_X86
// Pragmas, as the build gives no flags to single files. The standard headers stand before them:
// their inline functions, compiled for AVX here, could replace those of another file at link time.
// No lambda inside, since clang's attribute does not reach it. As torch, it takes F16C for granted
// where AVX2 is.
#define FUSED_SIMD
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#include "fused_cpu_kernel.inc"
}
#define FUSED_AVX512
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#include "fused_cpu_kernel.inc"
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

enum class Capability { kBaseline, kAvx2, kAvx512 };

// ATEN_CPU_CAPABILITY lowers it, as it does for torch itself.
Capability cpu_capability() {
#ifdef FUSED_X86
  static const Capability value = [] {
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string cap = asked ? asked : "";
    if (cap == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
      return Capability::kBaseline;
    }
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return cap != "avx2" && wide ? Capability::kAvx512 : Capability::kAvx2;
  }();
  return value;
#else
  return Capability::kBaseline;
#endif
}

// The path: the horizontal pass first where neighbouring output pixels read pixels close together.
template <typename T>
decltype(Layout::path) path_of(const Problem& p, const Mix<T>& mix) {
#ifdef FUSED_X86
  const Capability capability = cpu_capability();
  if (!std::is_same<T, float>::value || capability == Capability::kBaseline) {
    return Layout::kGeneral;
  }
  bool bytes = p.from_type == ScalarType::Byte, floats = true;
  for (int k = 0; k < mix.out; ++k) {  // one channel each, as it is
    bytes &= mix.in - std::count(mix.mix + k * mix.in, mix.mix + (k + 1) * mix.in, T(0)) <= 1;
  }
  for (int64_t g = 0; g < p.columns.variants * p.columns.groups; ++g) {
    const HalfGroup* halves = group_of(p.columns.data, p.columns.rows, g * kLanes).halves;
    floats &= capability == Capability::kAvx512
                  ? joined(halves[0], halves[1]).spread < 2 * kLanes
                  : std::max(halves[0].spread, halves[1].spread) < 2 * kHalf;
  }
  for (int64_t v = 0; bytes && v < p.columns.variants; ++v) {
    bytes = are_near(p.columns, p.columns.data + v * p.columns.groups * p.columns.rows * kLanes);
  }
  return bytes ? Layout::kBytes : floats ? Layout::kFloats : Layout::kGeneral;
#else
  return Layout::kGeneral;
#endif
}

// height: the output rows of a part, which `run` does by itself.
template <typename T>
Layout layout_of(const Problem& p, const Mix<T>& mix, int64_t height) {
  Layout l{};
  l.path = path_of(p, mix);
  int64_t width = kLanes;
  for (int64_t v = 0; v < p.columns.variants; ++v) {
    const int32_t* table = p.columns.data + v * p.columns.groups * p.columns.rows * kLanes;
    const Range seen = range_of(p.columns, table);
    width = std::max(width, whole(seen.high - seen.low));
  }
  int64_t most = 1;
  if (l.path == Layout::kGeneral) {
    l.pitch = width, l.block = kRows;
    most = std::min<int64_t>(p.rows.in, kRingPixels / l.pitch);
  } else {
    l.pitch = whole(p.columns.out), l.block = std::max<int64_t>(kRows, kBlockPixels / l.pitch);
    l.planar_rows = std::max<int64_t>(1, kBlockPixels / width);
    l.planar = l.planar_rows * width + 2 * kLanes;
    l.sums = whole(mix.out * p.rows.out * static_cast<int64_t>(sizeof(RowSum) / sizeof(float)));
    if (l.path == Layout::kBytes)
      l.shuffles = 2 * p.columns.groups * (p.columns.rows - kHeadRows) * kLanes;
  }
  for (int64_t v = 0; v < p.rows.variants; ++v) {
    const int32_t* table = p.rows.data + v * p.rows.groups * p.rows.rows * kLanes;
    for (int64_t begin = 0; begin < p.rows.out; begin += height) {
      const int64_t end = std::min(begin + height, p.rows.out);
      for (int64_t o = begin; o < end; o += l.block) {
        const Range seen = range_of(p.rows, table, o, std::min(o + l.block, end));
        most = std::max(most, seen.high - seen.low);
      }
    }
  }
  for (l.ring = 1; l.ring < most;) l.ring *= 2;

  // non-temporal stores fill whole lines only
  const int64_t to_size = size_of(p.to_type), row = p.columns.out * to_size,
                plane = p.rows.out * row, bytes = plane * mix.out * p.images;
  bool lines = p.to.column == 1 && reinterpret_cast<uintptr_t>(p.target) % 64 == 0 &&
               p.to.channel * to_size % 64 == 0 && bytes >= kStreamRowBytes &&
               cpu_capability() != Capability::kBaseline;
  for (int d = 0; d < p.to.dims; ++d) lines = lines && p.to.strides[d] * to_size % 64 == 0;
  int64_t stage = 0;
  if (lines && bytes >= kStreamBytes && height >= p.rows.out && p.to.row == p.columns.out &&
      plane % 64 == 0 && plane * mix.out <= kStageBytes) {
    l.stream = Layout::kPlane, stage = plane * mix.out;
  } else if (lines && (l.path != Layout::kGeneral || bytes >= kStreamBytes) && row % 64 == 0 &&
             p.to.row * to_size % 64 == 0) {
    l.stream = Layout::kRow, stage = kRows * row;
  }
  // of both paths: the one's sums and spare rows, or the other's planar rows, spare row and places
  const int64_t sums = kRows * (l.pitch + whole(p.columns.out)) + 2 * kLanes;
  const int64_t planar = l.planar + l.pitch + whole(4 * p.columns.groups) + l.shuffles + l.sums;
  l.scratch =
      mix.out * l.ring * l.pitch + std::max(sums, planar) + (stage + sizeof(T) - 1) / sizeof(T);
  return l;
}

}  // namespace

template <typename T>
void run_cpu(const Problem& p, const Mix<T>& mix) {
  // few images are cut into parts, so that all threads have the same number of them, or four at
  // least
  const int64_t pixels = p.rows.in * p.columns.in * mix.in + p.rows.out * p.columns.out * mix.out;
  const int64_t threads = torch::stable::get_num_threads(), wanted = 4 * threads;
  int64_t parts = 1;
  if (pixels >= kTaskPixels && p.images < wanted) {
    parts = std::min(threads / std::gcd(threads, p.images), (wanted + p.images - 1) / p.images);
  }
  const int64_t height = ((p.rows.out + parts - 1) / parts + kRows - 1) / kRows * kRows;
  parts = (p.rows.out + height - 1) / height;
  const int64_t grain = std::max<int64_t>(1, kTaskPixels / (pixels / parts));
  const Layout layout = layout_of(p, mix, height);
  auto run = baseline::run<T>;
#ifdef FUSED_X86
  const bool wide = cpu_capability() == Capability::kAvx512;
  if (cpu_capability() == Capability::kAvx2) run = avx2::run<T>;
  if (wide) run = avx512::run<T>;
  if constexpr (std::is_same<T, float>::value) {
    if (layout.path != Layout::kGeneral) run = wide ? avx512::run_rows : avx2::run_rows;
  }
#endif
  torch::stable::parallel_for(0, p.images * parts, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<T[]> memory(new T[layout.scratch + 64 / sizeof(T)]);
    T* scratch = memory.get();
    while (reinterpret_cast<uintptr_t>(scratch) % 64) ++scratch;
    run(p, mix, layout, Tasks{begin, end, parts, height, p.rows.out}, scratch);
#ifdef FUSED_X86
    if (layout.stream != Layout::kNone) _mm_sfence();
#endif
  });
}

template void run_cpu<float>(const Problem&, const Mix<float>&);
template void run_cpu<double>(const Problem&, const Mix<double>&);

}  // namespace fused
