// The launch of the CUDA kernel, one for a call, without scratch memory: how the target is cut into
// tiles, and what the kernel is told.
// The tests compile this file for the CPU: FUSED_LAUNCH_PROVIDED says that what the part up to
// `Launch` defines has been included already.
#include <algorithm>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define FUSED_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FUSED_THREADS 128

namespace fused {
namespace {

// A device and its current stream.
class Launch {
 public:
  explicit Launch(int32_t device) : guard_(device), device_(device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_) == AOTI_TORCH_SUCCESS,
                    "fused_transform: no current stream");
  }
  int processors() const {
    int count = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return count;
  }
  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), int64_t blocks, size_t shared, Arguments... arguments) {
    kernel<<<static_cast<unsigned>(blocks), FUSED_THREADS, shared,
             static_cast<cudaStream_t>(stream_)>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t device_;
  void* stream_ = nullptr;
};

}  // namespace
}  // namespace fused
#elif !defined(FUSED_LAUNCH_PROVIDED)
#error "fused_cuda.cu must be compiled by nvcc"
#endif

#include "fused_cuda_small.h"
#include "fused_cuda_tiles.h"

namespace fused {
namespace {

template <typename T>
int64_t taps_of(const Bands& bands) {
  return (bands.rows - kHeadRows) / static_cast<int64_t>(sizeof(T) / sizeof(int32_t));
}

int64_t whole_fours(int64_t n) { return (n + kFour - 1) / kFour * kFour; }

// About how many input pixels `size` output pixels read: a chunk of this length is loaded once. By
// the axis' lengths or, since a crop reads less, by the taps (for bilinear twice the scale).
int64_t reach(const Bands& bands, int64_t taps, int64_t size) {
  int64_t seen = (size * bands.in + bands.out - 1) / bands.out;
  if (taps > 2) seen = std::min(seen, size * taps / 2);
  return std::min(seen + taps + 1, bands.in);
}

// Whether four neighbouring pixels can be loaded at once wherever a row, plane or image begins.
template <typename In>
Load load_of(const Problem& p, int channels) {
  const View& view = p.from;
  const bool interleaved = view.channel == 1 && channels == 3 && view.column == 3;
  bool fours = p.columns.in % kFour == 0 && view.row % kFour == 0 &&
               (interleaved || (view.column == 1 && view.channel % kFour == 0)) &&
               reinterpret_cast<uintptr_t>(p.source) % sizeof(typename Four<In>::Word) == 0;
  for (int d = 0; d < view.dims; ++d) fours = fours && view.strides[d] % kFour == 0;
  return !fours ? Load::kAny : interleaved ? Load::kInterleaved : Load::kPlanes;
}

template <typename T>
Tiling tiling_of(const Problem& p, int64_t processors) {
  constexpr int64_t most = kChunkBytes / sizeof(T);
  const int64_t row_taps = taps_of<T>(p.rows), column_taps = taps_of<T>(p.columns);
  const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  // whole halves of groups: what these see is known
  const auto halves = [&](int64_t n) { return parts(n, kHalf) * kHalf; };
  const auto share = [&](int64_t n, int64_t size) { return halves(parts(n, parts(n, size))); };
  const auto pitch = [&](int64_t width) {
    return whole_fours(reach(p.columns, column_taps, width) + kFour - 1);
  };
  int64_t height = share(p.rows.out, kTileHeight);
  int64_t width = share(p.columns.out, std::min<int64_t>(kTileBytes / sizeof(T), kThreads));
  const auto tiling = [&] {
    Tiling t{};
    t.height = static_cast<int>(height), t.width = static_cast<int>(width);
    t.pitch = static_cast<int>(std::min(pitch(width), most));
    t.chunk_rows = static_cast<int>(std::min<int64_t>(reach(p.rows, row_taps, height), kChunkRows));
    const Shape shape(t.pitch, t.height);
    t.windows = t.chunk_rows * t.pitch;
    t.sums = t.windows + shape.groups * kFour * (kFew + 1);
    t.tile = t.sums + shape.groups * shape.stride;
    const bool used = t.pitch < p.columns.in;  // else a chunk holds whole rows
    t.bytes = (t.tile + (used ? t.height * t.width : 0)) * static_cast<int>(sizeof(T));
    return t;
  };
  // a tile shrinks until a chunk holds what it reads, a block holds the tile, and there are two
  // tiles per multiprocessor
  while (width > kHalf && pitch(width) > most) width = share(p.columns.out, width - kHalf);
  while (height > kHalf &&
         (reach(p.rows, row_taps, height) > kChunkRows || tiling().bytes > kShared)) {
    height = share(p.rows.out, height - kHalf);
  }
  const auto tiles = [&] {
    return p.images * parts(p.rows.out, height) * parts(p.columns.out, width);
  };
  while (std::max(height, width) > kHalf && tiles() < 2 * processors) {
    (height > width ? height : width) = halves((height > width ? height : width) / 2);
  }
  Tiling t = tiling();
  t.across = static_cast<unsigned>(parts(p.columns.out, width));
  t.down = static_cast<unsigned>(parts(p.rows.out, height));
  t.tiles = tiles();
  return t;
}

template <typename In, typename T>
Terms<T> terms_of(const Mix<T>& mix, bool dense) {
  constexpr T unit = kSmall<In, T> ? T(kPixel / kSum) : T(1);
  constexpr T sum = kSmall<In, T> ? T(kSum) : T(1);
  Terms<T> terms{};
  terms.in = mix.in, terms.out = mix.out, terms.clamped = mix.clamped;
  terms.planes = mix.in == 1 ? 1 : mix.out;
  int count = 0;
  for (int k = 0; k < mix.out; ++k) {
    terms.scale[k] = (mix.in == 1 ? mix.mix[k] : T(1)) * sum;
    terms.bias[k] = mix.bias[k], terms.low[k] = mix.low[k], terms.high[k] = mix.high[k];
    terms.begin[k] = static_cast<short>(count);
    for (int c = 0; c < mix.in; ++c) {
      const T w = mix.in == 1 ? T(1) : mix.mix[k * mix.in + c];
      if (w == 0 && !dense) continue;
      terms.channel[count] = static_cast<unsigned char>(c);
      terms.weight[count++] = w * unit;
    }
    if (terms.begin[k] == count) terms.scale[k] = 0;
  }
  terms.begin[mix.out] = static_cast<short>(count);
  const T *const begin = terms.scale, *const end = begin + mix.out;
  terms.plain = !mix.clamped && std::find(begin, end, T(0)) == end;
  return terms;
}

// How many terms each plane has, if fused_small_images_kernel can make it; else 0.
int small_terms(const Problem& p, const Terms<float>& terms, Load load, int64_t processors) {
  const int count = terms.begin[1];
  for (int k = 0; k < terms.planes; ++k) {
    if (terms.begin[k + 1] - terms.begin[k] != count) return 0;
  }
  const bool fits = load != Load::kAny && p.from.row == p.columns.in * p.from.column &&
                    p.columns.out <= kWarp && p.columns.in <= kPixels && p.rows.in <= kMaxCount &&
                    p.rows.out <= kMaxCount && p.images >= kWarpImages * processors;
  return fits && (count == 1 || count == 3) ? count : 0;
}

SmallTiling small_tiling(const Problem& p) {
  const Shape shape(static_cast<int>(p.columns.in), static_cast<int>(p.rows.out), 1);
  const int pixels = static_cast<int>(p.rows.in * p.columns.in);
  const int sums = pixels + shape.pitch + shape.groups * kFour * (kFew + 1);
  const int bytes = (sums + shape.groups * shape.stride) * static_cast<int>(sizeof(float));
  return {pixels, sums, bytes, shape};
}

template <typename In, typename T>
void launch(Problem p, const Mix<T>& mix, int32_t device) {
  Launch context(device);
  if (mix.in == 1) p.from.channel = 0;  // any stride means the same
  if (mix.out == 1) p.to.channel = 0;
  const int64_t processors = context.processors();
  const Load load = load_of<In>(p, mix.in);
  const Terms<T> terms = terms_of<In>(mix, load == Load::kInterleaved);
  if constexpr (sizeof(T) == 4) {
    const int count = small_terms(p, terms, load, processors);
    const SmallTiling t = small_tiling(p);
    constexpr int teams = kThreads / kWarp;
    if (count && t.bytes <= kShared / teams) {
      const auto kernel = [&](auto few) {
        return count == 1                   ? fused_small_images_kernel<few, 1, false, In>
               : load == Load::kInterleaved ? fused_small_images_kernel<few, 3, true, In>
                                            : fused_small_images_kernel<few, 3, false, In>;
      };
      const bool few = std::max(taps_of<T>(p.rows), taps_of<T>(p.columns)) <= kFew;
      return context.run(few ? kernel(std::true_type{}) : kernel(std::false_type{}),
                         std::min<int64_t>((p.images + teams - 1) / teams, processors * kBlocks),
                         t.bytes * teams, p, terms, t);
    }
  }
  Tiling t = tiling_of<T>(p, processors);
  t.load = load;
  context.run(fused_tiles_kernel<In, T>,
              std::min<int64_t>(t.tiles, processors * kBlocksPerProcessor), t.bytes, p, terms, t);
}

}  // namespace

template <typename T>
void run_cuda(const Problem& p, const Mix<T>& mix, int32_t device) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (p.from_type == ScalarType::Byte) return launch<uint8_t>(p, mix, device);
  if (p.from_type == ScalarType::Half) return launch<Half>(p, mix, device);
  if (p.from_type == ScalarType::BFloat16) return launch<BFloat16>(p, mix, device);
  if (p.from_type == ScalarType::Float) return launch<float>(p, mix, device);
  if constexpr (std::is_same<T, double>::value) launch<double>(p, mix, device);
}

template void run_cuda<float>(const Problem&, const Mix<float>&, int32_t);
template void run_cuda<double>(const Problem&, const Mix<double>&, int32_t);

}  // namespace fused
