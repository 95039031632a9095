// The operators: schema, argument checks, and dispatch to the device's kernel. Python computes the
// bands (common/fused/bands.py) and registers fakes and derivatives (common/fused/_ops.py).
#include "fused.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fused {
namespace {

using torch::headeronly::toString;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

View view_of(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  const auto sizes = t.sizes(), strides = t.strides();
  View v{{}, {}, 0, strides[last - 2], strides[last - 1], strides[last]};
  for (int64_t d = last - 3; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (v.dims && strides[d] == v.sizes[v.dims - 1] * v.strides[v.dims - 1]) {
      v.sizes[v.dims - 1] *= sizes[d];
      continue;
    }
    STD_TORCH_CHECK(v.dims < kBatchDims, "fused_transform: more than ", kBatchDims,
                    " leading dimensions that no stride joins; call .contiguous() first");
    v.sizes[v.dims] = sizes[d];
    v.strides[v.dims++] = strides[d];
  }
  return v;
}

// The bytes from the first element to behind the last; whether no two elements share memory.
std::pair<const char*, const char*> extent_of(const Tensor& t, bool* non_overlapping) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  *non_overlapping = true;
  for (const auto& [stride, size] : dims) {
    *non_overlapping = *non_overlapping && stride > reach;
    reach += stride * (size - 1);
  }
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  return {begin, begin + (reach + 1) * static_cast<int64_t>(t.element_size())};
}

bool is_supported(ScalarType type) {
  return type == ScalarType::Byte || type == ScalarType::Half || type == ScalarType::BFloat16 ||
         type == ScalarType::Float || type == ScalarType::Double;
}

// The bands of one axis (`axis`: rows or columns), checked as far as the CPU can see them.
Bands bands_of(const char* axis, const Tensor& t, const MaybeTensor& index, const Tensor& images,
               int64_t n, int64_t in, int64_t out, bool wide) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 4 && t.size(3) == kLanes &&
                      t.size(2) >= kHeadRows && t.is_contiguous() && t.size(0) >= 1 &&
                      t.size(1) == (out + kLanes - 1) / kLanes,
                  "separable_map: ", axis, " of shape ", shape(t), " are not the packed bands of ",
                  out, " output pixels");
  STD_TORCH_CHECK(t.device() == images.device(), "separable_map: ", axis,
                  " must be on the device of the images");
  Bands b{static_cast<const int32_t*>(t.const_data_ptr()),
          t.size(0),
          t.size(1),
          t.size(2),
          out,
          in,
          nullptr,
          0,
          false};
  if (index) {
    b.flags = index->scalar_type() == ScalarType::Bool;
    STD_TORCH_CHECK(b.flags ? b.variants == 2 : index->scalar_type() == ScalarType::Long,
                    "separable_map: the index of the ", axis,
                    " must be int64, or bool where there are two variants; it is ",
                    toString(index->scalar_type()), ", and there are ", b.variants);
    STD_TORCH_CHECK(images.dim() == 4 && index->dim() == 1 && index->size(0) == n,
                    "separable_map: an index of the ", axis, " of shape ", shape(*index),
                    " must hold one entry for each image of an (N, C, H, W) batch, which is ",
                    shape(images));
    STD_TORCH_CHECK(index->device() == images.device(), "separable_map: the index of the ", axis,
                    " must be on the device of the images");
    b.index = index->const_data_ptr();
    b.index_stride = n > 1 ? index->stride(0) : 1;
  } else {
    STD_TORCH_CHECK(b.variants == 1, "separable_map: the ", axis, " have ", b.variants,
                    " variants, so an index must say which one each image takes");
  }
  if (images.is_cuda()) return b;
  for (int64_t i = 0; b.index && !b.flags && i < n; ++i) {
    const int64_t v = static_cast<const int64_t*>(b.index)[i * b.index_stride];
    STD_TORCH_CHECK(v >= 0 && v < b.variants, "separable_map: the index of the ", axis, " holds ",
                    v, ", of ", b.variants, " variants");
  }
  const int64_t taps = (b.rows - kHeadRows) / (wide ? 2 : 1), groups = b.variants * b.groups;
  bool fits = true;
  for (int64_t g = 0; g < groups; ++g) {
    const Group& group = group_of(b.data, b.rows, g * kLanes);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t first = group.first[lane], count = group.count[lane];
      fits &= first >= 0 && count >= 0 && count <= taps && first + count <= in;
      const HalfGroup& half = group.halves[lane / kHalf];
      fits &= count == 0 || (first >= half.low && first + count <= half.high);
    }
    for (const HalfGroup& half : group.halves) {
      fits &= half.low >= 0 && half.low <= half.high && half.high <= in && half.most <= taps;
    }
  }
  STD_TORCH_CHECK(fits, "separable_map: the ", axis, " reach beyond the ", in,
                  " pixels of the images, or hold fewer weights than they count");
  return b;
}

template <typename T>
Mix<T> mix_of(const Tensor& mix, const MaybeTensor& affine) {
  Mix<T> m;
  m.out = static_cast<int>(mix.size(0));
  m.in = static_cast<int>(mix.size(1));
  const double* from = static_cast<const double*>(mix.const_data_ptr());
  const int64_t down = mix.stride(0), across = mix.stride(1);
  for (int k = 0; k < m.out; ++k) {
    for (int c = 0; c < m.in; ++c) {
      m.mix[k * m.in + c] = static_cast<T>(from[k * down + c * across]);
    }
    const double* a =
        affine ? static_cast<const double*>(affine->const_data_ptr()) + 3 * k : nullptr;
    m.bias[k] = a ? static_cast<T>(a[0]) : T(0);
    m.low[k] = a ? static_cast<T>(a[1]) : -std::numeric_limits<T>::infinity();
    m.high[k] = a ? static_cast<T>(a[2]) : std::numeric_limits<T>::infinity();
  }
  m.clamped = false;
  for (int k = 0; k < m.out; ++k) {
    m.clamped |= !std::isinf(m.low[k]) || !std::isinf(m.high[k]);
  }
  return m;
}

struct Arguments {
  const Tensor &images, &rows, &columns, &mix;
  const MaybeTensor &affine, &row_index, &column_index;
  int64_t height, width, out_height, out_width;
  ScalarType dtype;
};

std::vector<int64_t> checked_shape(const Arguments& a) {
  const Tensor& images = a.images;
  const int64_t dim = images.dim();
  STD_TORCH_CHECK(is_supported(images.scalar_type()),
                  "fused_transform: images must be uint8, float16, bfloat16, float32 or float64, "
                  "not ",
                  toString(images.scalar_type()));
  STD_TORCH_CHECK(is_supported(a.dtype),
                  "fused_transform: dtype must be uint8, float16, bfloat16, float32 or float64, "
                  "not ",
                  toString(a.dtype));
  STD_TORCH_CHECK(a.mix.scalar_type() == ScalarType::Double && a.mix.dim() == 2 && a.mix.is_cpu() &&
                      a.mix.size(0) >= 1 && a.mix.size(1) >= 1 && a.mix.size(0) <= kMaxChannels &&
                      a.mix.size(1) <= kMaxChannels,
                  "separable_map: mix must be a float64 (C_out, C_in) tensor on the CPU with at "
                  "most ",
                  kMaxChannels, " channels, not ", toString(a.mix.scalar_type()), " ",
                  shape(a.mix));
  STD_TORCH_CHECK(
      !a.affine || (a.affine->scalar_type() == ScalarType::Double && a.affine->dim() == 2 &&
                    a.affine->is_cpu() && a.affine->is_contiguous() &&
                    a.affine->size(0) == a.mix.size(0) && a.affine->size(1) == 3),
      "separable_map: affine must be a float64 (C_out, 3) tensor on the CPU: bias, low "
      "and high of each channel of the result");
  STD_TORCH_CHECK(dim >= 3 && images.size(dim - 3) == a.mix.size(1),
                  "fused_transform: images must be (..., ", a.mix.size(1), ", H, W), not ",
                  shape(images));
  constexpr int64_t most = int64_t{1} << 30;
  STD_TORCH_CHECK(a.height >= 1 && a.width >= 1 && a.height < most && a.width < most,
                  "fused_transform: images must have at least one pixel and fewer than 2**30 "
                  "rows and columns, not ",
                  shape(images));
  STD_TORCH_CHECK(images.size(dim - 2) == a.height && images.size(dim - 1) == a.width,
                  "separable_map: the bands are for images of ", a.height, " x ", a.width,
                  " pixels, and these are ", shape(images));
  STD_TORCH_CHECK(
      a.out_height >= 1 && a.out_width >= 1 && a.out_height < most && a.out_width < most,
      "fused_transform: size must be two positive integers below 2**30, not (", a.out_height, ", ",
      a.out_width, ")");
  std::vector<int64_t> sizes(images.sizes().begin(), images.sizes().end());
  sizes[dim - 3] = a.mix.size(0);
  sizes[dim - 2] = a.out_height;
  sizes[dim - 1] = a.out_width;
  return sizes;
}

template <typename T>
void run(const Problem& p, const Arguments& a) {
  const Mix<T> mix = mix_of<T>(a.mix, a.affine);
#ifdef USE_CUDA
  if (a.images.is_cuda()) return run_cuda<T>(p, mix, a.images.get_device_index());
#endif
  run_cpu<T>(p, mix);
}

// `target` gives the tensor to write to, once everything else has been checked.
template <typename Target>
void apply(const Arguments& a, const Target& target) {
  const Tensor& images = a.images;
  const int64_t dim = images.dim();
  int64_t n = 1;
  for (int64_t d = 0; d < dim - 3; ++d) n *= images.size(d);
  const bool wide = images.scalar_type() == ScalarType::Double || a.dtype == ScalarType::Double;
  Problem p;
  p.rows = bands_of("rows", a.rows, a.row_index, images, n, a.height, a.out_height, wide);
  p.columns = bands_of("columns", a.columns, a.column_index, images, n, a.width, a.out_width, wide);
  p.from = view_of(images);
  p.from_type = images.scalar_type();
  p.to_type = a.dtype;
  p.images = n;
  const Tensor& to = target();
  if (n == 0) return;
  p.to = view_of(to);
  p.source = images.const_data_ptr();
  p.target = to.mutable_data_ptr();
  wide ? run<double>(p, a) : run<float>(p, a);
}

int32_t shim_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return aoti_torch_dtype_uint8();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    default:
      return aoti_torch_dtype_float64();
  }
}

Tensor applied(const Arguments& a) {
  const std::vector<int64_t> sizes = checked_shape(a);
  Tensor to;
  apply(a, [&]() -> const Tensor& {
    // not torch::stable::empty, which looks its operator up by name at each call
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size() - 1; d > 0; --d) {
      strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
    }
    int32_t device_type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.images.get(), &device_type));
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), shim_dtype(a.dtype),
                                 device_type, a.images.get_device_index(), &handle));
    return to = Tensor(handle);
  });
  return to;
}

const int64_t* checked_sizes(const Tensor& sizes) {
  STD_TORCH_CHECK(sizes.scalar_type() == ScalarType::Long && sizes.dim() == 1 &&
                      sizes.size(0) == 4 && sizes.is_cpu() && sizes.is_contiguous(),
                  "separable_map: sizes must be an int64 tensor on the CPU: height and width of "
                  "the images and of the result");
  return static_cast<const int64_t*>(sizes.const_data_ptr());
}

ScalarType result_type(const Tensor& images, std::optional<ScalarType> dtype) {
  if (dtype) return *dtype;
  const ScalarType type = images.scalar_type();
  return type == ScalarType::Byte ? ScalarType::Float : type;
}

Tensor separable_map(Tensor images, Tensor rows, Tensor columns, Tensor mix, Tensor sizes,
                     MaybeTensor affine, MaybeTensor row_index, MaybeTensor column_index,
                     std::optional<ScalarType> dtype) {
  const int64_t* n = checked_sizes(sizes);
  return applied({images, rows, columns, mix, affine, row_index, column_index, n[0], n[1], n[2],
                  n[3], result_type(images, dtype)});
}

Tensor differentiable(Tensor images, Tensor rows, Tensor columns, Tensor, Tensor, Tensor mix,
                      MaybeTensor affine, MaybeTensor row_index, MaybeTensor column_index,
                      int64_t height, int64_t width, int64_t out_height, int64_t out_width,
                      ScalarType dtype) {
  return applied({images, rows, columns, mix, affine, row_index, column_index, height, width,
                  out_height, out_width, dtype});
}

void separable_map_out(Tensor images, Tensor rows, Tensor columns, Tensor mix, Tensor sizes,
                       MaybeTensor affine, MaybeTensor row_index, MaybeTensor column_index,
                       std::optional<ScalarType> dtype, Tensor out) {
  const int64_t* n = checked_sizes(sizes);
  const Arguments a{images,       rows, columns, mix,  affine, row_index,
                    column_index, n[0], n[1],    n[2], n[3],   result_type(images, dtype)};
  const std::vector<int64_t> shape_of_result = checked_shape(a);
  STD_TORCH_CHECK(out.scalar_type() == a.dtype, "fused_transform: out must be ", toString(a.dtype),
                  ", not ", toString(out.scalar_type()));
  STD_TORCH_CHECK(std::equal(shape_of_result.begin(), shape_of_result.end(), out.sizes().begin(),
                             out.sizes().end()),
                  "fused_transform: out is ", shape(out), ", the result of images ", shape(images),
                  " has height ", a.out_height, ", width ", a.out_width, " and ", mix.size(0),
                  " channels");
  STD_TORCH_CHECK(out.device() == images.device(),
                  "fused_transform: out must be on the device of the images");
  if (out.numel() > 0) {
    bool non_overlapping, any;
    const auto target = extent_of(out, &non_overlapping), source = extent_of(images, &any);
    STD_TORCH_CHECK(non_overlapping,
                    "fused_transform: elements of out share memory; use a tensor of its own");
    STD_TORCH_CHECK(target.second <= source.first || source.second <= target.first,
                    "fused_transform: out must not lie in the memory of the images");
  }
  apply(a, [&]() -> const Tensor& { return out; });
}

// Traces and derivatives use `differentiable`: it takes the transposed bands, and its sizes are
// integers, which a fake can read. Plain calls use the other two. For one small image, converting
// four integers and a dtype would take a tenth of the time. So a tensor holds the sizes, and dtype
// may be omitted: the default is float32 for uint8 images, else the dtype of the images.
STABLE_TORCH_LIBRARY(fused_transform, m) {
#define FUSED_BANDS "(Tensor images, Tensor rows, Tensor columns, "
#define FUSED_OPTIONS "Tensor? affine, Tensor? row_index, Tensor? column_index, "
  m.def("separable_map" FUSED_BANDS "Tensor mix, Tensor sizes, " FUSED_OPTIONS
        "ScalarType? dtype) -> Tensor");
  m.def("separable_map_out" FUSED_BANDS "Tensor mix, Tensor sizes, " FUSED_OPTIONS
        "ScalarType? dtype, Tensor(a!) out) -> ()");
  m.def("differentiable" FUSED_BANDS
        "Tensor rows_transposed, Tensor columns_transposed, Tensor mix, " FUSED_OPTIONS
        "int height, int width, int out_height, int out_width, ScalarType dtype) -> Tensor");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("separable_map", TORCH_BOX(&separable_map));
  m.impl("separable_map_out", TORCH_BOX(&separable_map_out));
  m.impl("differentiable", TORCH_BOX(&differentiable));
}

STABLE_TORCH_LIBRARY_IMPL(fused_transform, CPU, m) { implement(m); }
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fused_transform, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace fused
