// The CPU kernel: tables of weights, kept for the next call of the same sizes; the work in tasks
// over the threads; and code for the widest vectors that the processor has when it runs.
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "fused.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define FUSED_X86
#include <immintrin.h>
#endif

namespace fused {
namespace {

constexpr int64_t kLanes = 16, kRows = 7;  // what 32 registers hold; divides 28 and 224

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A banded matrix: row i has weights for the columns [first[i], first[i] + count[i]), no more than
// `width` of them.
template <typename T>
struct Bands {
  int64_t rows, columns, width;
  std::vector<int32_t> first, count;  // padded to whole groups of kLanes rows
  std::vector<T> weight;              // (rows, width)
  // For vectors, by groups of kLanes rows: (groups, width, kLanes), and the least `first` of a
  // group, or -1 where its taps do not fit into two registers.
  std::vector<T> lane_weight;
  std::vector<int64_t> base;

  Bands(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    first.resize(padded(rows));
    count.resize(padded(rows));
  }

  void allocate() {  // once `count` is known
    width = *std::max_element(count.begin(), count.end());
    weight.resize(rows * width);
  }
};

template <typename T>
Bands<T> resize_bands(int64_t in, int64_t out, bool flip) {
  const Axis<T> axis(in, out);
  Bands<T> bands(out, in);
  std::vector<Window<T>> windows;
  for (int64_t i = 0; i < out; ++i) {
    windows.push_back(window(axis, flip ? out - 1 - i : i));
    bands.first[i] = static_cast<int32_t>(windows[i].first);
    bands.count[i] = static_cast<int32_t>(windows[i].count);
  }
  bands.allocate();
  for (int64_t i = 0; i < out; ++i) {
    T *w = &bands.weight[i * bands.width], sum = 0;
    for (int32_t j = 0; j < bands.count[i]; ++j) sum += w[j] = weight(axis, windows[i], j);
    for (int32_t j = 0; j < bands.count[i] && sum != 0; ++j) w[j] /= sum;
  }
  return bands;
}

// The rows that see a column follow each other, since the windows move one way.
template <typename T>
Bands<T> transposed(const Bands<T>& bands) {
  Bands<T> result(bands.columns, bands.rows);
  for (int64_t i = 0; i < bands.rows; ++i) {
    for (int32_t column = bands.first[i]; column < bands.first[i] + bands.count[i]; ++column) {
      if (result.count[column]++ == 0) result.first[column] = static_cast<int32_t>(i);
    }
  }
  result.allocate();
  for (int64_t i = 0; i < bands.rows; ++i) {
    for (int32_t j = 0; j < bands.count[i]; ++j) {
      const int64_t column = bands.first[i] + j;
      result.weight[column * result.width + i - result.first[column]] =
          bands.weight[i * bands.width + j];
    }
  }
  return result;
}

template <typename T>
void fill_lanes(Bands<T>& bands) {
  bands.lane_weight.resize(padded(bands.rows) * bands.width);
  for (int64_t group = 0; group < bands.rows; group += kLanes) {
    int32_t low = bands.first[group], high = 0;
    for (int64_t i = group; i < std::min(group + kLanes, bands.rows); ++i) {
      low = std::min(low, bands.first[i]);
      high = std::max(high, bands.first[i] + bands.count[i]);
      for (int32_t j = 0; j < bands.count[i]; ++j) {
        bands.lane_weight[group * bands.width + j * kLanes + i - group] =
            bands.weight[i * bands.width + j];
      }
    }
    bands.base.push_back(high - low <= 2 * kLanes ? low : -1);
  }
}

template <typename T>
struct Plan {
  int64_t height, width, out_height, out_width;
  bool backward;
  Bands<T> rows, columns[2];               // columns[hflip]
  int64_t pitch, spare, ring, v, scratch;  // lengths, in elements

  Plan(const Problem& p, bool backward)
      : height(p.height),
        width(p.width),
        out_height(p.out_height),
        out_width(p.out_width),
        backward(backward),
        rows(bands(height, out_height, false)),
        columns{bands(width, out_width, false), bands(width, out_width, true)} {
    fill_lanes(columns[0]);
    fill_lanes(columns[1]);
    pitch = padded(columns[0].columns);
    spare = padded(columns[0].rows);
    // the ring holds what kRows rows of the result see; a power of two spares divisions
    int64_t seen = std::min<int64_t>(rows.columns, 2048 / pitch);
    for (int64_t o = 0; o < rows.rows; ++o) {
      const int64_t last = std::min(o + kRows, rows.rows) - 1;
      seen = std::max<int64_t>(seen, rows.first[last] + rows.count[last] - rows.first[o]);
    }
    for (ring = 1; ring < seen;) ring *= 2;
    v = kRows * pitch + 2 * kLanes;  // two registers are read from any pixel on
    scratch = ring * pitch + v + kRows * spare;
  }

  Bands<T> bands(int64_t in, int64_t out, bool flip) const {
    const Bands<T> forward = resize_bands<T>(in, out, flip);
    return backward ? transposed(forward) : forward;
  }

  bool serves(const Problem& p, bool b) const {
    return height == p.height && width == p.width && out_height == p.out_height &&
           out_width == p.out_width && backward == b;
  }
};

namespace baseline {
#include "fused_rows.h"
}

#ifdef FUSED_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#include "fused_rows.h"
}
#define FUSED_AVX512
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#include "fused_rows.h"
}
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// 0: baseline, 1: AVX2, 2: AVX-512. ATEN_CPU_CAPABILITY lowers it, as it does for torch itself.
int level() {
#ifdef FUSED_X86
  static const int value = [] {
    const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string cap = asked ? asked : "";
    if (cap == "default" || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
      return 0;
    }
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return cap != "avx2" && wide ? 2 : 1;
  }();
  return value;
#else
  return 0;
#endif
}

template <bool backward, typename In, typename Out, typename T>
void launch(const Problem& p) {
  auto run = baseline::run<backward, In, Out, T>;
#ifdef FUSED_X86
  if (level() == 1) run = avx2::run<backward, In, Out, T>;
  if (level() == 2) run = avx512::run<backward, In, Out, T>;
#endif
  // weights take longer than one small image: a thread keeps its last tables
  thread_local std::unique_ptr<Plan<T>> kept;
  if (!kept || !kept->serves(p, backward)) kept = std::make_unique<Plan<T>>(p, backward);
  const Plan<T>& plan = *kept;
  // few images are cut into bands of rows, so that each thread has some
  const int64_t pixels = p.height * p.width + p.out_height * p.out_width;
  const int64_t wanted = 4 * torch::stable::get_num_threads();
  int64_t bands = pixels < 1 << 15 || p.images >= wanted ? 1 : (wanted + p.images - 1) / p.images;
  const int64_t height = std::max(kRows, (plan.rows.rows + bands - 1) / bands);
  bands = (plan.rows.rows + height - 1) / height;
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (pixels / bands));
  // a result larger than the caches is written past them: no line is read to be overwritten
  const int64_t result = p.out_height * p.out_width, bytes = result * sizeof(T);
  const bool dense = p.to.dims == 1 && p.to.strides[0] == result && p.to.row == p.out_width &&
                     p.to.column == 1 && reinterpret_cast<uintptr_t>(p.target) % 64 == 0;
  const bool past = level() == 2 && !backward && std::is_same<Out, T>::value && bands == 1 &&
                    dense && bytes % 64 == 0 && bytes <= 1 << 15 && bytes * p.images >= 1 << 23;
  const int64_t stage = past ? result : 0;
  torch::stable::parallel_for(0, p.images * bands, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> memory(plan.scratch + kLanes + stage);
    T* scratch = memory.data();
    while (reinterpret_cast<uintptr_t>(scratch) % 64) ++scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % bands * height;
      run(p, plan, task / bands, first, std::min(first + height, plan.rows.rows), scratch,
          stage ? scratch + plan.scratch : nullptr);
    }
#ifdef FUSED_X86
    if (stage) _mm_sfence();
#endif
  });
}

}  // namespace

template <bool backward>
void run_cpu(const Problem& p, ScalarType type) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (type == ScalarType::Byte) return launch<false, uint8_t, float, float>(p);
  if (type == ScalarType::Half) return launch<backward, Half, Half, float>(p);
  if (type == ScalarType::BFloat16) return launch<backward, BFloat16, BFloat16, float>(p);
  if (type == ScalarType::Float) return launch<backward, float, float, float>(p);
  return launch<backward, double, double, double>(p);
}

template void run_cpu<false>(const Problem&, ScalarType);
template void run_cpu<true>(const Problem&, ScalarType);

}  // namespace fused
