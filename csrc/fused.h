// What both kernels share: the weights of torch's antialiased resize, and a problem's geometry.
#pragma once
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#ifdef __CUDACC__
#define FUSED_HD __host__ __device__ inline
#else
#define FUSED_HD inline
#endif

namespace fused {

FUSED_HD double gray_weight(int channel) {
  return channel == 0 ? 0.2989 : channel == 1 ? 0.587 : 0.114;
}
constexpr int kBatchDims = 8;  // leading dimensions left after merging those that can be merged

// A product that no compiler fuses with the sum after it: a rounding decides whether a pixel lies
// under the filter, and with it where a NaN spreads.
FUSED_HD double mul(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  volatile double product = a * b;
  return product;
#endif
}

// One axis of the resize. T is the type torch reckons weights in: double for double, else float.
// Output pixel o sees the input pixels [first, first + count) through a triangle of the width of
// one output pixel (at least one input pixel). The steps and roundings are torch's own
// (aten/src/ATen/native/cpu/UpSampleKernel.cpp), which skips an axis whose size does not change.
template <typename T>
struct Axis {
  int64_t in, out;
  T scale, support, inverse;
  int64_t longest;  // no window is longer

  FUSED_HD Axis(int64_t in, int64_t out) : in(in), out(out) {
    scale = static_cast<T>(in) / static_cast<T>(out);
    support = scale >= 1 ? scale : T(1);
    inverse = scale >= 1 ? T(1) / scale : T(1);
    const int64_t whole = static_cast<int64_t>(support);
    longest = in == out ? 1 : 2 * (whole + (static_cast<T>(whole) < support)) + 1;
    if (longest > in) longest = in;
  }
};

template <typename T>
struct Window {
  int64_t first, count;
  T center;
};

template <typename T>
FUSED_HD Window<T> window(const Axis<T>& axis, int64_t o) {
  if (axis.in == axis.out) return {o, 1, T(0)};
  const T center = static_cast<T>(mul(axis.scale, static_cast<double>(o) + 0.5));
  int64_t first = static_cast<int64_t>(static_cast<double>(center - axis.support) + 0.5);
  int64_t last = static_cast<int64_t>(static_cast<double>(center + axis.support) + 0.5);
  if (first < 0) first = 0;
  if (last > axis.in) last = axis.in;
  int64_t count = last - first;
  if (count > axis.longest) count = axis.longest;
  return {first, count < 0 ? 0 : count, center};
}

// The weight of pixel first + j before the division by the window's sum, which runs from j = 0 up.
template <typename T>
FUSED_HD T weight(const Axis<T>& axis, const Window<T>& window, int64_t j) {
  if (axis.in == axis.out) return T(1);
  const T distance = static_cast<T>(window.first + j) - window.center;
  T x = static_cast<T>(mul(static_cast<double>(distance) + 0.5, axis.inverse));
  if (x < 0) x = -x;
  return x < 1 ? T(1) - x : T(0);
}

// Strides in elements; `sizes` and `strides` are of the batch, innermost dimension first.
struct View {
  int64_t sizes[kBatchDims], strides[kBatchDims];
  int dims;
  int64_t channel, row, column;

  FUSED_HD int64_t image(int64_t n) const {
    int64_t offset = 0;
    for (int d = 0; d < dims - 1; ++d) {
      offset += n % sizes[d] * strides[d];
      n /= sizes[d];
    }
    return dims ? offset + n * strides[dims - 1] : 0;
  }
};

struct Flip {
  bool always;
  const bool* mask;  // one for each image, or null
  int64_t stride;

  FUSED_HD bool operator()(int64_t n) const { return mask ? mask[n * stride] : always; }
};

// forward: source (n, 3, height, width) -> target (n, 1, out_height, out_width).
// backward: source (n, 1, out_height, out_width) -> target (n, 3, height, width).
struct Problem {
  const void* source;
  void* target;
  View from, to;
  Flip hflip, vflip;
  int64_t images, height, width, out_height, out_width;
};

// `type` is that of the source; the caller has checked everything. Nothing is empty.
using torch::headeronly::ScalarType;
template <bool backward>
void run_cpu(const Problem& problem, ScalarType type);
template <bool backward>
void run_cuda(const Problem& problem, ScalarType type, int32_t device);

}  // namespace fused
