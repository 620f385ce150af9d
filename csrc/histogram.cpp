#include "histogram.h"

namespace lambda_kernels {
namespace {

std::string device_name(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : "device " + std::to_string(tensor.get_device_index());
}

void check_same_device(const Tensor& x, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() == other.is_cpu() && x.get_device_index() == other.get_device_index(),
                  "histogram: all tensors must be on one device, got x on ", device_name(x), " and ", name, " on ",
                  device_name(other));
}

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

void check_tensors(const std::vector<Tensor>& x) {
  STD_TORCH_CHECK(!x.empty(), "histogram: x must hold at least one tensor");
  for (const Tensor& tensor : x) {
    STD_TORCH_CHECK(tensor.dim() == 3, "histogram: x must have 3 dimensions [outer, rows, columns], got ",
                    tensor.dim());
    STD_TORCH_CHECK(is_floating(tensor.scalar_type()),
                    "histogram: x must have dtype Float, Half, BFloat16 or Double, got ", tensor.scalar_type());
    STD_TORCH_CHECK(tensor.scalar_type() == x[0].scalar_type(), "histogram: all of x must have one dtype, got ",
                    x[0].scalar_type(), " and ", tensor.scalar_type());
    check_same_device(x[0], tensor, "x");
  }
}

void check_grid(const Tensor& x, const Tensor& grid, int64_t targets) {
  STD_TORCH_CHECK(grid.dim() == 2 && grid.size(0) == targets && grid.size(1) == 4,
                  "histogram: grid must have shape [K, 4] with K = ", targets, " for this x, got ", grid.dim(),
                  " dimensions and ", grid.numel(), " elements");
  STD_TORCH_CHECK(grid.scalar_type() == ScalarType::Double, "histogram: grid must have dtype Double, got ",
                  grid.scalar_type());
  STD_TORCH_CHECK(grid.is_contiguous(), "histogram: grid must be contiguous, got strides ", grid.stride(0), ", ",
                  grid.stride(1));
  check_same_device(x, grid, "grid");
}

void check_only(const Tensor& x, const Tensor& only, int64_t targets) {
  STD_TORCH_CHECK(only.dim() == 1 && only.size(0) == targets, "histogram: only must have shape [K] with K = ", targets,
                  " for this x, got ", only.dim(), " dimensions and ", only.numel(), " elements");
  STD_TORCH_CHECK(only.scalar_type() == ScalarType::Bool, "histogram: only must have dtype Bool, got ",
                  only.scalar_type());
  STD_TORCH_CHECK(only.is_contiguous(), "histogram: only must be contiguous, got stride ", only.stride(0));
  check_same_device(x, only, "only");
}

}  // namespace

Call prepare(const std::vector<Tensor>& x, const std::optional<Tensor>& grid, int64_t bins, int64_t per,
             bool statistics, const std::optional<Tensor>& only) {
  check_tensors(x);
  STD_TORCH_CHECK(per >= 0 && per < kPerCount, "histogram: per must be in [0, ", int64_t{kPerCount}, "), got ", per);
  STD_TORCH_CHECK(bins >= 0 && bins <= kMaxBins, "histogram: bins must be in [0, ", kMaxBins, "], got ", bins);

  Call call{};
  call.dtype = x[0].scalar_type();
  call.per = static_cast<Per>(per);
  call.bins = static_cast<int32_t>(bins);
  for (const Tensor& tensor : x) {
    const Source source{tensor.data_ptr(), tensor.size(0),   tensor.size(1),   tensor.size(2),
                        tensor.stride(0),  tensor.stride(1), tensor.stride(2), call.targets};
    call.targets += source.targets(call.per);
    if (tensor.numel() > 0) {
      call.sources.push_back(source);
    }
  }
  if (grid.has_value()) {
    check_grid(x[0], *grid, call.targets);
    call.grid = static_cast<const ChannelGrid*>(grid->data_ptr());
  } else if (bins > 0) {
    STD_TORCH_CHECK(bins == kCodes && call.dtype == ScalarType::BFloat16,
                    "histogram: without a grid the codes of BFloat16 are counted, which takes ", kCodes,
                    " bins; got ", bins, " bins and dtype ", call.dtype);
  }
  if (only.has_value()) {
    check_only(x[0], *only, call.targets);
    call.only = static_cast<const bool*>(only->data_ptr());
  }
  Tensor counts = torch::stable::new_zeros(x[0], {call.targets, bins}, ScalarType::Long);
  Tensor outside =
      torch::stable::new_zeros(x[0], {call.targets, static_cast<int64_t>(kOutsideCount)}, ScalarType::Long);
  Tensor moments = torch::stable::new_empty(x[0], {statistics ? call.targets : 0, kMomentsColumns}, ScalarType::Double);
  call.counts = static_cast<int64_t*>(counts.data_ptr());
  call.outside = static_cast<int64_t*>(outside.data_ptr());
  call.moments = statistics ? static_cast<Moments*>(moments.data_ptr()) : nullptr;
  call.results = {std::move(counts), std::move(outside), std::move(moments)};
  return call;
}

}  // namespace lambda_kernels
