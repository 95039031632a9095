// The CUDA kernel, one launch for a call. Each block takes a tile of one channel of the target at a
// time: mixed pixels into shared memory by chunks of rows and columns, the vertical pass, the
// horizontal pass, and the tile out. A chunk has a fixed size, so that any image fits.
// The tests compile this file for the CPU: FUSED_LAUNCH_PROVIDED says that what the part up to
// `Launch` defines has been included already.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "fused.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#define FUSED_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FUSED_THREADS 256

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

namespace fused {
namespace {

constexpr int kThreads = FUSED_THREADS;
constexpr int kTileHeight = 32, kTileBytes = 256;  // of the target: rows, bytes of T in a row
constexpr int kChunkRows = 40, kChunkBytes = 512;  // of the source, in shared memory
constexpr int kBlocksPerProcessor = 8;             // a multiple of what is resident at once
constexpr int kAlign = 16;                         // chunks begin at multiples of so many pixels

template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T v[size];
};

template <typename T>
__device__ Pack<T>& pack(T* p) {
  return *reinterpret_cast<Pack<T>*>(p);
}
template <typename T>
__device__ const Pack<T>& pack(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}

template <typename Out, typename T>
__device__ Out converted(T x) {
  if constexpr (std::is_same<Out, uint8_t>::value) {
    constexpr T whole = sizeof(T) == 8 ? T(6755399441055744.0) : T(12582912.0);
    x = x > 0 ? x : T(0);  // a NaN becomes 0
    x = x < 255 ? x : T(255);
    volatile T sum = x + whole;  // rounds to nearest, ties to even; no compiler takes it back
    return static_cast<uint8_t>(static_cast<int>(sum - whole));
  } else {
    return static_cast<Out>(x);
  }
}

// Lengths in pixels. A tile is a part of the target; a chunk the part of the source at work.
struct Tiling {
  int height, width, chunk_rows, chunk_columns;
  int64_t down, across, tiles;
};

// A thread's place in rows of `width` items, and how many rows the block covers at once.
struct ThreadTile {
  int x, y, step;
  __device__ explicit ThreadTile(int width)
      : x(threadIdx.x % width), y(threadIdx.x / width), step(kThreads / width) {
    if (y >= step) y = 1 << 30;  // left over
  }
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
};

// Rows [y0, y0 + rows) of channel k of the mixed source into the chunk, from column x0 on.
template <typename In, typename T>
__device__ void load_chunk(const In* source, const Problem& p, const Mix<T>& mix, int k, int y0,
                           int rows, int x0, int pitch, bool aligned, T* chunk) {
  constexpr int load_size = Pack<In>::size, vector = Pack<T>::size;
  const ThreadTile place(pitch / load_size);
  const int x = x0 + place.x * load_size, width = static_cast<int>(p.columns.in);
#pragma unroll 1
  for (int y = place.y; y < rows; y += place.step) {
    const In* const from = source + int64_t{y0 + y} * p.from.row;
    T* const to = chunk + y * pitch + place.x * load_size;
    if (aligned && x + load_size <= width) {
      T sum[load_size];
#pragma unroll
      for (int i = 0; i < load_size; ++i) sum[i] = T(0);
#pragma unroll 4
      for (int c = 0; c < mix.in; ++c) {
        const T w = mix.mix[k * mix.in + c];
        if (w == 0) continue;
        const Pack<In> a = pack(from + x + c * p.from.channel);
#pragma unroll
        for (int i = 0; i < load_size; ++i) sum[i] += T(a.v[i]) * w;
      }
#pragma unroll
      for (int i = 0; i < load_size; i += vector) {
        Pack<T> part;
#pragma unroll
        for (int j = 0; j < vector; ++j) part.v[j] = sum[i + j];
        pack(to + i) = part;
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < load_size; ++i) {
        T sum = 0;
        for (int c = 0; c < mix.in && x + i < width; ++c) {
          const T w = mix.mix[k * mix.in + c];
          if (w != 0) sum += T(from[c * p.from.channel + (x + i) * p.from.column]) * w;
        }
        to[i] = sum;
      }
    }
  }
}

// The vertical pass over the chunk's rows [y0, y0 + chunk_rows): into `sums`, a row for each of the
// tile's, or added to it.
template <typename T>
__device__ void resample_rows(const Bands& bands, const int32_t* table, const Span& span, int y0,
                              int chunk_rows, int pitch, bool add, const T* chunk, T* sums) {
  constexpr int vector = Pack<T>::size;
  const ThreadTile place(pitch / vector);
#pragma unroll 1
  for (int y = place.y; y < span.length; y += place.step) {
    const int o = span.begin + y;
    const Group& group = group_of(table, bands.rows, o);
    const int first = group.first[o % kLanes] - y0;
    const T* const weights = weights_of<T>(group) + o % kLanes;
    const int begin = max(first, 0), end = min(first + group.count[o % kLanes], chunk_rows);
    Pack<T> sum{};
    Pack<T>& to = pack(sums + y * pitch + place.x * vector);
    if (add) sum = to;
#pragma unroll 1
    for (int t = begin; t < end; ++t) {
      const T w = weights[(t - first) * kLanes];
      const Pack<T> from = pack(chunk + t * pitch + place.x * vector);
#pragma unroll
      for (int i = 0; i < vector; ++i) sum.v[i] += from.v[i] * w;
    }
    to = sum;
  }
}

// The horizontal pass over the chunk's columns [x0, x0 + pitch): into the tile, or added to it.
template <typename T>
__device__ void resample_columns(const Bands& bands, const int32_t* table, const Span& span, int x0,
                                 int pitch, int height, bool add, const T* sums, T* tile) {
  const ThreadTile place(span.length);
  const int o = span.begin + min(place.x, span.length - 1);
  const Group& group = group_of(table, bands.rows, o);
  const int first = group.first[o % kLanes] - x0;
  const int begin = max(first, 0), end = min(first + group.count[o % kLanes], pitch);
  const T* const weights = weights_of<T>(group) + o % kLanes + (begin - first) * kLanes;
  T few[4];  // most windows are short: their weights stay in registers
#pragma unroll
  for (int t = 0; t < 4; ++t) few[t] = begin + t < end ? weights[t * kLanes] : T(0);
#pragma unroll 1
  for (int y = place.y; y < height; y += place.step) {
    T& to = tile[y * span.length + place.x];
    T sum = add ? to : T(0);
    const T* const from = sums + y * pitch + begin;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      if (begin + t < end) sum += from[t] * few[t];
    }
#pragma unroll 1
    for (int t = 4; begin + t < end; ++t) sum += from[t] * weights[t * kLanes];
    to = sum;
  }
}

template <typename Out, typename T>
__device__ Out finished(T x, T bias, T low, T high) {
  x += bias;
  return converted<Out>(x < low ? low : x > high ? high : x);
}

template <typename Out, typename T>
__device__ void store_tile(const Problem& p, const Mix<T>& mix, int k, const Span& rows,
                           const Span& columns, const T* tile, Out* target) {
  constexpr int store_size = Pack<Out>::size;
  const T bias = mix.bias[k], low = mix.low[k], high = mix.high[k];
  const int height = rows.length, width = columns.length, pixels = height * width;
  Out* const to = target + int64_t{rows.begin} * p.to.row + int64_t{columns.begin} * p.to.column;
  if (p.to.column == 1 && p.to.row == width && pixels % store_size == 0 &&
      reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (int i = threadIdx.x * store_size; i < pixels; i += kThreads * store_size) {
      Pack<Out> out;
#pragma unroll
      for (int j = 0; j < store_size; ++j) out.v[j] = finished<Out>(tile[i + j], bias, low, high);
      pack(to + i) = out;
    }
    return;
  }
  const ThreadTile place(width);
#pragma unroll 1
  for (int y = place.y; y < height; y += place.step) {
    to[y * p.to.row + place.x * p.to.column] =
        finished<Out>(tile[y * width + place.x], bias, low, high);
  }
}

template <typename In, typename Out, typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    fused_separable_map_kernel(Problem p, Mix<T> mix, Tiling tiling, bool aligned) {
  FUSED_SHARED(memory);
  const int pitch = tiling.chunk_columns;
  T* const chunk = reinterpret_cast<T*>(memory);
  T* const sums = chunk + tiling.chunk_rows * pitch;
  T* const tile = sums + tiling.height * pitch;

  for (int64_t index = blockIdx.x; index < tiling.tiles; index += gridDim.x) {
    const int64_t parts = tiling.down * tiling.across, n = index / (parts * mix.out);
    const int k = static_cast<int>(index / parts % mix.out);
    const int32_t *row_table = p.rows.table(n), *column_table = p.columns.table(n);
    const Span rows(p.rows, row_table,
                    static_cast<int>(index / tiling.across % tiling.down) * tiling.height,
                    tiling.height);
    const Span columns(p.columns, column_table,
                       static_cast<int>(index % tiling.across) * tiling.width, tiling.width);
    const In* const source = static_cast<const In*>(p.source) + p.from.image(n);
    const int begin_x = columns.low / kAlign * kAlign;
    for (int x0 = begin_x; x0 == begin_x || x0 < columns.high; x0 += pitch) {
      for (int y0 = rows.low; y0 == rows.low || y0 < rows.high; y0 += tiling.chunk_rows) {
        const int chunk_rows = min(rows.high - y0, tiling.chunk_rows);
        load_chunk(source, p, mix, k, y0, chunk_rows, x0, pitch, aligned, chunk);
        __syncthreads();
        resample_rows(p.rows, row_table, rows, y0, chunk_rows, pitch, y0 != rows.low, chunk, sums);
        __syncthreads();
      }
      resample_columns(p.columns, column_table, columns, x0, pitch, rows.length, x0 != begin_x,
                       sums, tile);
    }
    __syncthreads();
    Out* const target = static_cast<Out*>(p.target) + p.to.image(n) + k * p.to.channel;
    store_tile(p, mix, k, rows, columns, tile, target);
  }
}

// About how many input pixels `size` output pixels see: a chunk of this length is loaded once.
int64_t reach(const Bands& bands, int64_t taps, int64_t size) {
  const int64_t step = (bands.in + bands.out - 1) / bands.out;
  return std::min(size * step + taps + 1, bands.in);
}

template <typename In, typename Out, typename T>
void launch(const Problem& p, const Mix<T>& mix, int32_t device) {
  Launch context(device);
  // a tile is made smaller where there are too few for all processors
  const int64_t processors = context.processors();
  const int64_t height = p.rows.out, width = p.columns.out, planes = p.images * mix.out;
  Tiling t;
  t.width = static_cast<int>(std::min<int64_t>(width, kTileBytes / sizeof(T)));
  t.height = static_cast<int>(std::min<int64_t>(height, kTileHeight));
  t.across = (width + t.width - 1) / t.width;
  const auto down = [&] { return (height + t.height - 1) / t.height; };
  while (t.height > 4 && planes * t.across * down() < 2 * processors) {
    t.height = (t.height + 1) / 2;
  }
  t.down = down();
  t.tiles = planes * t.across * t.down;
  constexpr int64_t words = sizeof(T) / sizeof(int32_t);
  const int64_t row_taps = (p.rows.rows - kHeadRows) / words;
  const int64_t column_taps = (p.columns.rows - kHeadRows) / words;
  const auto whole = [](int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; };
  const int64_t wide = whole(reach(p.columns, column_taps, t.width) + kAlign - 1);
  t.chunk_columns = static_cast<int>(std::min<int64_t>(wide, kChunkBytes / sizeof(T)));
  t.chunk_rows = static_cast<int>(std::min<int64_t>(reach(p.rows, row_taps, t.height), kChunkRows));
  const size_t shared =
      ((t.chunk_rows + t.height) * t.chunk_columns + t.height * t.width) * sizeof(T);

  const auto whole_packs = [&](int64_t stride) { return stride % Pack<In>::size == 0; };
  bool aligned = p.from.column == 1 && whole_packs(p.from.row) && whole_packs(p.from.channel) &&
                 reinterpret_cast<uintptr_t>(p.source) % 16 == 0;
  for (int d = 0; d < p.from.dims; ++d) aligned = aligned && whole_packs(p.from.strides[d]);
  context.run(fused_separable_map_kernel<In, Out, T>,
              std::min<int64_t>(t.tiles, processors * kBlocksPerProcessor), shared, p, mix, t,
              aligned);
}

template <typename In, typename T>
void launch_to(const Problem& p, const Mix<T>& mix, int32_t device) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  // T is double where either side is
  if constexpr (std::is_same<T, float>::value || std::is_same<In, double>::value) {
    if (p.to_type == ScalarType::Byte) return launch<In, uint8_t>(p, mix, device);
    if (p.to_type == ScalarType::Half) return launch<In, Half>(p, mix, device);
    if (p.to_type == ScalarType::BFloat16) return launch<In, BFloat16>(p, mix, device);
    if (p.to_type == ScalarType::Float) return launch<In, float>(p, mix, device);
  }
  if constexpr (std::is_same<T, double>::value) launch<In, double>(p, mix, device);
}

}  // namespace

template <typename T>
void run_cuda(const Problem& p, const Mix<T>& mix, int32_t device) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (p.from_type == ScalarType::Byte) return launch_to<uint8_t>(p, mix, device);
  if (p.from_type == ScalarType::Half) return launch_to<Half>(p, mix, device);
  if (p.from_type == ScalarType::BFloat16) return launch_to<BFloat16>(p, mix, device);
  if (p.from_type == ScalarType::Float) return launch_to<float>(p, mix, device);
  if constexpr (std::is_same<T, double>::value) launch_to<double>(p, mix, device);
}

template void run_cuda<float>(const Problem&, const Mix<float>&, int32_t);
template void run_cuda<double>(const Problem&, const Mix<double>&, int32_t);

}  // namespace fused
