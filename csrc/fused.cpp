// The operators: schema, checks, and the way to the kernel of the device. The Python side
// (common/transforms.py) registers what they mean without data (fake) and their gradients.
#include "fused.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace fused {
namespace {

using torch::stable::Tensor;
using Mask = std::optional<Tensor>;

std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

View view(const Tensor& t) {
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

Flip flip(const char* name, bool always, const Mask& mask, const Tensor& images) {
  if (!mask) return {always, nullptr, 0};
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "fused_transform: ", name,
                  " must be a bool or a bool tensor, not a tensor of ",
                  torch::headeronly::toString(mask->scalar_type()));
  STD_TORCH_CHECK(images.dim() == 4 && mask->dim() == 1 && mask->size(0) == images.size(0),
                  "fused_transform: ", name, " of shape ", shape(*mask),
                  " must hold one flag for each image of an (N, 3, H, W) batch, which is ",
                  shape(images));
  STD_TORCH_CHECK(mask->device() == images.device(), "fused_transform: ", name,
                  " must be on the device of the images");
  return {false, mask->const_data_ptr<bool>(), mask->stride(0)};
}

// The bytes from the first element to behind the last; `alone`: no two elements share memory.
std::pair<const char*, const char*> extent(const Tensor& t, bool* alone) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  *alone = true;
  for (const auto& [stride, size] : dims) {
    *alone = *alone && stride > reach;
    reach += stride * (size - 1);
  }
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  return {begin, begin + (reach + 1) * static_cast<int64_t>(t.element_size())};
}

ScalarType result_type(ScalarType type) {
  return type == ScalarType::Byte ? ScalarType::Float : type;
}

// `from` is images or, backward, their result's gradient; height and width are those of the other.
template <bool backward>
std::vector<int64_t> target_shape(const Tensor& from, int64_t height, int64_t width) {
  const ScalarType type = from.scalar_type();
  const int64_t channels = backward ? 1 : 3, dim = from.dim();
  STD_TORCH_CHECK((type == ScalarType::Byte && !backward) || type == ScalarType::Half ||
                      type == ScalarType::BFloat16 || type == ScalarType::Float ||
                      type == ScalarType::Double,
                  "fused_transform: images must be uint8, float16, bfloat16, float32 or float64, "
                  "not ",
                  torch::headeronly::toString(type));
  STD_TORCH_CHECK(dim >= 3 && from.size(dim - 3) == channels,
                  "fused_transform: images must be (..., 3, H, W), not ", shape(from));
  constexpr int64_t most = int64_t{1} << 30;
  const int64_t h = from.size(dim - 2), w = from.size(dim - 1);
  STD_TORCH_CHECK(h >= 1 && w >= 1 && h < most && w < most,
                  "fused_transform: images must have at least one pixel and fewer than 2**30 "
                  "rows and columns, not ",
                  shape(from));
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height < most && width < most,
                  "fused_transform: size must be two positive integers below 2**30, not (", height,
                  ", ", width, ")");
  std::vector<int64_t> sizes(from.sizes().begin(), from.sizes().end());
  sizes[dim - 3] = backward ? 3 : 1;
  sizes[dim - 2] = height;
  sizes[dim - 1] = width;
  return sizes;
}

template <bool backward>
void run(const Tensor& from, const Tensor& to, bool hflip, bool vflip, const Mask& hmask,
         const Mask& vmask) {
  const int64_t dim = from.dim();
  const Tensor &images = backward ? to : from, &result = backward ? from : to;
  Problem p{nullptr,
            nullptr,
            view(from),
            view(to),
            flip("hflip", hflip, hmask, from),
            flip("vflip", vflip, vmask, from),
            images.numel() ? images.numel() / images.size(dim - 1) / images.size(dim - 2) / 3 : 0,
            images.size(dim - 2),
            images.size(dim - 1),
            result.size(dim - 2),
            result.size(dim - 1)};
  if (p.images == 0) return;
  p.source = from.const_data_ptr();
  p.target = to.mutable_data_ptr();
#ifdef USE_CUDA
  if (from.is_cuda()) return run_cuda<backward>(p, from.scalar_type(), from.get_device_index());
#endif
  run_cpu<backward>(p, from.scalar_type());
}

template <bool backward>
Tensor made(const Tensor& from, int64_t height, int64_t width, bool hflip, bool vflip, Mask hmask,
            Mask vmask) {
  const std::vector<int64_t> sizes = target_shape<backward>(from, height, width);
  // not torch::stable::empty, which looks its operator up by name at each call
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size() - 1; d > 0; --d) {
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  }
  int32_t type, device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(from.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(from.get(), &device_type));
  if (from.scalar_type() == ScalarType::Byte) type = aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                                         type, device_type, from.get_device_index(),
                                                         &handle));
  const Tensor to(handle);
  run<backward>(from, to, hflip, vflip, hmask, vmask);
  return to;
}

void forward_out(const Tensor& images, int64_t height, int64_t width, bool hflip, bool vflip,
                 Mask hmask, Mask vmask, const Tensor& out) {
  const std::vector<int64_t> sizes = target_shape<false>(images, height, width);
  const ScalarType type = result_type(images.scalar_type());
  STD_TORCH_CHECK(out.scalar_type() == type, "fused_transform: out must be ",
                  torch::headeronly::toString(type), ", not ",
                  torch::headeronly::toString(out.scalar_type()));
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), out.sizes().begin(), out.sizes().end()),
                  "fused_transform: out is ", shape(out), ", the result of images ", shape(images),
                  " has height ", height, " and width ", width, " and one channel");
  STD_TORCH_CHECK(out.device() == images.device(),
                  "fused_transform: out must be on the device of the images");
  if (out.numel() == 0) return;
  bool alone, any;
  const auto target = extent(out, &alone), source = extent(images, &any);
  STD_TORCH_CHECK(alone, "fused_transform: elements of out share memory; use a tensor of its own");
  STD_TORCH_CHECK(target.second <= source.first || source.second <= target.first,
                  "fused_transform: out must not lie in the memory of the images");
  run<false>(images, out, hflip, vflip, hmask, vmask);
}

STABLE_TORCH_LIBRARY(fused_transform, m) {
#define FUSED_ARGS \
  "SymInt height, SymInt width, bool hflip, bool vflip, Tensor? hmask, Tensor? vmask"
  m.def("forward(Tensor images, " FUSED_ARGS ") -> Tensor");
  m.def("backward(Tensor grad, " FUSED_ARGS ") -> Tensor");
  // forward without a gradient: a call need not pass through autograd's Python
  m.def("infer(Tensor images, " FUSED_ARGS ") -> Tensor");
  m.def("forward_out(Tensor images, " FUSED_ARGS ", Tensor(a!) out) -> ()");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("forward", TORCH_BOX(&made<false>));
  m.impl("infer", TORCH_BOX(&made<false>));
  m.impl("forward_out", TORCH_BOX(&forward_out));
  m.impl("backward", TORCH_BOX(&made<true>));
}

STABLE_TORCH_LIBRARY_IMPL(fused_transform, CPU, m) { implement(m); }
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fused_transform, CUDA, m) { implement(m); }
#endif

}  // namespace
}  // namespace fused
