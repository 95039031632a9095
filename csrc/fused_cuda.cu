// The CUDA kernel. One small launch reckons the weights; in the other each block takes a tile of
// the target at a time: gray pixels into shared memory by chunks of rows and columns, the vertical
// pass, the horizontal pass, and the tile out. A chunk has a fixed size, so that any image fits.
// tests/host_cuda.h stands in for CUDA where this is compiled for the CPU.
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

// A device, its current stream, and scratch memory that lives as long as the kernels need it.
class Launch {
 public:
  Launch(int32_t device, int64_t bytes) : guard_(device), device_(device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream_) == AOTI_TORCH_SUCCESS,
                    "fused_transform: no current stream");
    scratch_ = torch::stable::empty({bytes}, ScalarType::Byte, torch::headeronly::Layout::Strided,
                                    torch::stable::Device(torch::headeronly::kCUDA, device));
  }
  void* memory() const { return scratch_.mutable_data_ptr(); }
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
  torch::stable::Tensor scratch_;
};

}  // namespace
}  // namespace fused
#else
#include "../tests/host_cuda.h"
#endif

namespace fused {
namespace {

constexpr int kThreads = FUSED_THREADS;

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

// A banded matrix as in fused_cpu.cpp, with the weights of neighbouring rows side by side:
// weight[j * rows + i] belongs to column first[i] + j.
template <typename T>
struct Bands {
  int rows;
  int32_t *first, *count;
  T* weight;
};

template <bool backward, typename T>
__device__ void fill(const Axis<T>& axis, const Bands<T>& bands, int64_t i) {
  const auto sum = [&](const Window<T>& seen) {
    T total = 0;
    for (int64_t j = 0; j < seen.count; ++j) total += weight(axis, seen, j);
    return total == 0 ? T(1) : total;
  };
  int32_t count = 0;
  if (!backward) {
    const Window<T> seen = window(axis, i);
    const T total = sum(seen);
    bands.first[i] = static_cast<int32_t>(seen.first);
    for (; count < seen.count; ++count) {
      bands.weight[int64_t{count} * bands.rows + i] = weight(axis, seen, count) / total;
    }
  } else {  // the windows that hold pixel i follow each other
    const double guess = (static_cast<double>(i) - axis.support) / axis.scale - 3;
    for (int64_t o = guess > 0 ? static_cast<int64_t>(guess) : 0; o < axis.out; ++o) {
      const Window<T> seen = window(axis, o);
      if (seen.first > i) break;
      if (seen.first + seen.count <= i) continue;
      if (count == 0) bands.first[i] = static_cast<int32_t>(o);
      bands.weight[int64_t{count++} * bands.rows + i] =
          weight(axis, seen, i - seen.first) / sum(seen);
    }
    if (count == 0) bands.first[i] = 0;
  }
  bands.count[i] = count;
}

template <bool backward, typename T>
__global__ void __launch_bounds__(kThreads)
    fill_bands(Axis<T> vertical, Axis<T> horizontal, Bands<T> rows, Bands<T> columns) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
       i < rows.rows + columns.rows; i += static_cast<int64_t>(gridDim.x) * kThreads) {
    if (i < rows.rows) fill<backward>(vertical, rows, i);
    if (i >= rows.rows) fill<backward>(horizontal, columns, i - rows.rows);
  }
}

// Lengths in pixels. A tile is a part of the target; a chunk the part of the source at work.
struct Tiling {
  int height, width, chunk_rows, chunk_columns;
  int64_t down, across, tiles;
};

// A thread's place in rows of `width` items, and how many rows the block covers at once.
struct Place {
  int x, y, step;
  __device__ explicit Place(int width)
      : x(threadIdx.x % width), y(threadIdx.x / width), step(kThreads / width) {
    if (y >= step) y = 1 << 30;  // left over
  }
};

template <bool backward, typename In, typename Out, typename T>
__global__ void __launch_bounds__(kThreads, 4)
    transform(Problem p, Bands<T> rows, Bands<T> columns, Tiling tiling, bool aligned) {
  FUSED_SHARED(memory);
  constexpr int load_size = Pack<In>::size, quad = Pack<T>::size, store_size = Pack<Out>::size;
  const int pitch = tiling.chunk_columns;
  T* const chunk = reinterpret_cast<T*>(memory);
  T* const v = chunk + tiling.chunk_rows * pitch;
  T* const sums = v + tiling.height * pitch;
  const int source_height = backward ? p.out_height : p.height;
  const int source_width = backward ? p.out_width : p.width;
  const T unit = std::is_same<In, uint8_t>::value ? T(1) / T(255) : T(1);
  const T red = T(gray_weight(0)) * unit, green = T(gray_weight(1)) * unit,
          blue = T(gray_weight(2)) * unit;
  const Place load(pitch / load_size), across(pitch / quad);

  for (int64_t index = blockIdx.x; index < tiling.tiles; index += gridDim.x) {
    const int64_t n = index / (tiling.down * tiling.across);
    const int top = index / tiling.across % tiling.down * tiling.height;
    const int left = index % tiling.across * tiling.width;
    const int height = min(rows.rows - top, tiling.height);
    const int width = min(columns.rows - left, tiling.width);
    const bool hflip = p.hflip(n), vflip = p.vflip(n);
    const In* const source = static_cast<const In*>(p.source) + p.from.image(n);
    const bool packed = aligned && !(backward && hflip);

    const int begin_y = rows.first[top], last_y = top + height - 1;
    const int end_y = rows.first[last_y] + rows.count[last_y];
    const int begin_x = columns.first[left] / 16 * 16, last_x = left + width - 1;
    const int end_x = columns.first[last_x] + columns.count[last_x];
    const Place along(width);

    for (int x0 = begin_x; x0 == begin_x || x0 < end_x; x0 += pitch) {
      for (int y0 = begin_y; y0 == begin_y || y0 < end_y; y0 += tiling.chunk_rows) {
        const int chunk_rows = min(end_y - y0, tiling.chunk_rows);
        const int x = x0 + load.x * load_size;
#pragma unroll 1
        for (int y = load.y; y < chunk_rows; y += load.step) {
          const int row = backward && vflip ? source_height - 1 - y0 - y : y0 + y;
          const In* const from = source + int64_t{row} * p.from.row;
          T* const to = chunk + y * pitch + load.x * load_size;
          if (packed && x + load_size <= source_width) {
            const Pack<In> a = pack(from + x);
            Pack<In> b, c;
            if (!backward) b = pack(from + x + p.from.channel);
            if (!backward) c = pack(from + x + 2 * p.from.channel);
#pragma unroll
            for (int k = 0; k < load_size; k += quad) {
              Pack<T> gray;
#pragma unroll
              for (int i = 0; i < quad; ++i) {
                gray.v[i] =
                    backward ? T(a.v[k + i])
                             : T(a.v[k + i]) * red + T(b.v[k + i]) * green + T(c.v[k + i]) * blue;
              }
              pack(to + k) = gray;
            }
          } else {
#pragma unroll 1
            for (int k = 0; k < load_size; ++k) {
              const int column = backward && hflip ? source_width - 1 - x - k : x + k;
              const In* const pixel = from + int64_t{column} * p.from.column;
              const bool inside = x + k < source_width;
              if (!inside) {
                to[k] = 0;
              } else if (backward) {
                to[k] = T(pixel[0]);
              } else {
                to[k] = T(pixel[0]) * red + T(pixel[p.from.channel]) * green +
                        T(pixel[2 * p.from.channel]) * blue;
              }
            }
          }
        }
        __syncthreads();
#pragma unroll 1
        for (int y = across.y; y < height; y += across.step) {
          const int i = top + y, first = rows.first[i];
          const int begin = max(first - y0, 0);
          const int end = min(first + rows.count[i] - y0, chunk_rows);
          Pack<T> sum{};
          Pack<T>& to = pack(v + y * pitch + across.x * quad);
          if (y0 != begin_y) sum = to;
#pragma unroll 1
          for (int t = begin; t < end; ++t) {
            const T w = rows.weight[int64_t{y0 + t - first} * rows.rows + i];
            const Pack<T> from = pack(chunk + t * pitch + across.x * quad);
#pragma unroll
            for (int k = 0; k < quad; ++k) sum.v[k] += from.v[k] * w;
          }
          to = sum;
        }
        __syncthreads();
      }
      const int i = left + min(along.x, width - 1), first = columns.first[i];
      const int begin = max(first - x0, 0);
      const int end = min(first + columns.count[i] - x0, pitch);
      const T* const weights = columns.weight + int64_t{x0 + begin - first} * columns.rows + i;
      T few[4];  // most windows are short: their weights stay in registers
#pragma unroll
      for (int t = 0; t < 4; ++t)
        few[t] = begin + t < end ? weights[int64_t{t} * columns.rows] : T(0);
#pragma unroll 1
      for (int y = along.y; y < height; y += along.step) {
        const int to_y = vflip && !backward ? height - 1 - y : y;
        const int to_x = hflip && !backward ? width - 1 - along.x : along.x;
        T& to = sums[to_y * width + to_x];
        T sum = x0 == begin_x ? T(0) : to;
        const T* const from = v + y * pitch + begin;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          if (begin + t < end) sum += from[t] * few[t];
        }
#pragma unroll 1
        for (int t = 4; begin + t < end; ++t) sum += from[t] * weights[int64_t{t} * columns.rows];
        to = sum;
      }
    }
    __syncthreads();
    const int to_top = vflip && !backward ? rows.rows - top - height : top;
    const int to_left = hflip && !backward ? columns.rows - left - width : left;
    for (int c = 0; c < (backward ? 3 : 1); ++c) {
      const T scale = backward ? T(gray_weight(c)) : T(1);
      Out* const to = static_cast<Out*>(p.target) + p.to.image(n) + c * p.to.channel +
                      int64_t{to_top} * p.to.row + int64_t{to_left} * p.to.column;
      const int pixels = height * width;
      if (p.to.column == 1 && p.to.row == width && pixels % store_size == 0 &&
          reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        for (int i = threadIdx.x * store_size; i < pixels; i += kThreads * store_size) {
          Pack<Out> out;
#pragma unroll
          for (int k = 0; k < store_size; ++k) out.v[k] = static_cast<Out>(sums[i + k] * scale);
          pack(to + i) = out;
        }
      } else {
#pragma unroll 1
        for (int y = along.y; y < height; y += along.step) {
          to[y * p.to.row + along.x * p.to.column] =
              static_cast<Out>(sums[y * width + along.x] * scale);
        }
      }
    }
  }
}

template <typename T>
int64_t longest(const Axis<T>& axis, bool backward) {
  return backward ? static_cast<int64_t>(2 * axis.support / axis.scale) + 3 : axis.longest;
}

// No tile of `size` rows of the matrix sees more columns.
template <typename T>
int64_t reach(const Axis<T>& axis, bool backward, int64_t size) {
  const double step = backward ? 1 / static_cast<double>(axis.scale) : axis.scale;
  return static_cast<int64_t>(static_cast<double>(size) * step) + longest(axis, backward) + 1;
}

template <bool backward, typename In, typename Out, typename T>
void launch(const Problem& p, int32_t device) {
  const Axis<T> vertical(p.height, p.out_height), horizontal(p.width, p.out_width);
  const int64_t height = backward ? p.height : p.out_height;
  const int64_t width = backward ? p.width : p.out_width;
  const int64_t source_height = backward ? p.out_height : p.height;
  const int64_t source_width = backward ? p.out_width : p.width;

  const int64_t row_weights = height * longest(vertical, backward);
  const int64_t column_weights = width * longest(horizontal, backward);
  Launch context(
      device, (row_weights + column_weights) * sizeof(T) + 2 * (height + width) * sizeof(int32_t));
  T* const weights = static_cast<T*>(context.memory());
  int32_t* const counts = reinterpret_cast<int32_t*>(weights + row_weights + column_weights);
  const Bands<T> rows{static_cast<int>(height), counts, counts + height, weights};
  const Bands<T> columns{static_cast<int>(width), counts + 2 * height, counts + 2 * height + width,
                         weights + row_weights};

  // a tile is made smaller where there are too few for all processors
  const int64_t processors = context.processors();
  Tiling t;
  t.width = static_cast<int>(std::min<int64_t>(width, 256 / sizeof(T)));
  t.height = static_cast<int>(std::min<int64_t>(height, 32));
  t.across = (width + t.width - 1) / t.width;
  const auto down = [&] { return (height + t.height - 1) / t.height; };
  while (t.height > 4 && p.images * t.across * down() < 2 * processors) {
    t.height = (t.height + 1) / 2;
  }
  t.down = down();
  t.tiles = p.images * t.across * t.down;
  const auto whole = [](int64_t n) { return (n + 15) / 16 * 16; };
  const int64_t wide = whole(std::min(reach(horizontal, backward, t.width) + 15, source_width));
  t.chunk_columns = static_cast<int>(std::min<int64_t>(wide, 512 / sizeof(T)));
  t.chunk_rows =
      static_cast<int>(std::min({reach(vertical, backward, t.height), source_height, int64_t{40}}));
  const size_t shared =
      ((t.chunk_rows + t.height) * t.chunk_columns + t.height * t.width) * sizeof(T);

  const auto whole_packs = [&](int64_t stride) { return stride % Pack<In>::size == 0; };
  bool aligned = p.from.column == 1 && whole_packs(p.from.row) && whole_packs(p.from.channel) &&
                 reinterpret_cast<uintptr_t>(p.source) % 16 == 0;
  for (int d = 0; d < p.from.dims; ++d) aligned = aligned && whole_packs(p.from.strides[d]);

  const int64_t filling = (height + width + kThreads - 1) / kThreads;
  context.run(fill_bands<backward, T>, std::min<int64_t>(filling, processors * 8), 0, vertical,
              horizontal, rows, columns);
  context.run(transform<backward, In, Out, T>, std::min<int64_t>(t.tiles, processors * 8), shared,
              p, rows, columns, t, aligned);
}

}  // namespace

template <bool backward>
void run_cuda(const Problem& p, ScalarType type, int32_t device) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (type == ScalarType::Byte) return launch<false, uint8_t, float, float>(p, device);
  if (type == ScalarType::Half) return launch<backward, Half, Half, float>(p, device);
  if (type == ScalarType::BFloat16) return launch<backward, BFloat16, BFloat16, float>(p, device);
  if (type == ScalarType::Float) return launch<backward, float, float, float>(p, device);
  return launch<backward, double, double, double>(p, device);
}

template void run_cuda<false>(const Problem&, ScalarType, int32_t);
template void run_cuda<true>(const Problem&, ScalarType, int32_t);

}  // namespace fused
