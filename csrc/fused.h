// What both kernels share: bands as they lie in memory, the geometry of a problem, its channel mix.
#pragma once
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#ifdef __CUDACC__
#define FUSED_HD __host__ __device__ inline
#else
#define FUSED_HD inline
#endif

namespace fused {

using torch::headeronly::ScalarType;

constexpr int kBatchDims = 8;     // leading dimensions left after merging those that can be merged
constexpr int kMaxChannels = 16;  // the mix is passed by value, also to the CUDA kernel
constexpr int kLanes = 16;        // output pixels in a group: the lanes of one AVX-512 register
constexpr int kHalf = 8;          // and of one AVX2 register

// What Python computes of eight neighbouring output pixels, for the choice of a kernel's loop.
struct HalfGroup {
  int32_t low, high;    // they see the input pixels [low, high)
  int32_t least, most;  // the counts of their taps
  int32_t spread;       // the largest `first` minus the smallest
  // Where each `first` is one more than its neighbour's, but for one step of two: how many lanes
  // come before that step, negative where `first` goes down; else 0.
  int32_t regular;
  int32_t unused[2];
};

// One group of kLanes output pixels, followed by its weights, (taps, kLanes) of T. The lanes behind
// the last output pixel repeat it. A pixel without taps has count 0 and a `first` within the group.
struct Group {
  int32_t first[kLanes], count[kLanes];
  HalfGroup halves[2];
};
constexpr int kHeadRows = sizeof(Group) / (kLanes * sizeof(int32_t));  // in rows of the tensor
static_assert(sizeof(Group) == kHeadRows * kLanes * sizeof(int32_t), "rows of kLanes integers");

// The bands of one axis: an int32 tensor (variants, groups, kHeadRows + taps, kLanes), where the
// weights are float32 bits, or float64 bits in twice as many rows (common/fused/_layout.py).
// `index` says which variant an image takes: flags, 64-bit integers, or null for variant 0.
struct Bands {
  const int32_t* data;
  int64_t variants, groups, rows, out, in;
  const void* index;
  int64_t index_stride;
  bool flags;

  FUSED_HD int64_t variant(int64_t n) const {
    if (!index) return 0;
    if (flags) return static_cast<const bool*>(index)[n * index_stride];
    const int64_t v = static_cast<const int64_t*>(index)[n * index_stride];
    return v < 0 ? 0 : v < variants ? v : variants - 1;  // on a GPU nobody has checked it
  }
  FUSED_HD const int32_t* table(int64_t n) const {
    return index ? data + variant(n) * groups * rows * kLanes : data;
  }
};

// The group of output pixel o in a table, and the weights of that pixel, one every kLanes.
FUSED_HD const Group& group_of(const int32_t* table, int64_t rows, int64_t o) {
  return *reinterpret_cast<const Group*>(table + o / kLanes * rows * kLanes);
}
template <typename T>
FUSED_HD const T* weights_of(const Group& group) {
  return reinterpret_cast<const T*>(&group + 1);
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

// target[n, k] = clamp(sum over c of mix[k, c] * rows @ source[n, c] @ columns^T + bias[k]).
// A coefficient of 0 is no term: a NaN in that channel does not spread.
template <typename T>
struct Mix {
  int in, out;
  T mix[kMaxChannels * kMaxChannels];  // (out, in)
  T bias[kMaxChannels], low[kMaxChannels], high[kMaxChannels];
  bool clamped;
};

struct Problem {
  const void* source;
  void* target;
  ScalarType from_type, to_type;
  View from, to;
  Bands rows, columns;
  int64_t images;
};

// T is the type of the weights and of the sums. The caller has checked everything; nothing is
// empty.
template <typename T>
void run_cpu(const Problem& problem, const Mix<T>& mix);
template <typename T>
void run_cuda(const Problem& problem, const Mix<T>& mix, int32_t device);

}  // namespace fused
