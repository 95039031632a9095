// The CPU kernel: the work in tasks over the threads, and code for the widest vectors that the
// processor has when it runs.
#include "fused_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>

namespace fused {
namespace {

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
