// Which operator runs what: memory and copies have code of their own, everything else is the fallback.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include <set>

#include "ops.h"

namespace greenroom {

using namespace at;  // for torch's lists of operators under autocast, which name its types

namespace {

Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
  Tensor result = target;
  copy_(result, self, non_blocking);
  return target;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
  Tensor result = target;
  result.resize_(self.sizes());
  copy_(result, self, false);
  return target;
}

int device_index(std::optional<c10::Device> device) {
  return known_device(device.has_value() ? device->index() : -1);
}

Tensor new_tensor(int device, c10::IntArrayRef sizes, c10::IntArrayRef strides, size_t nbytes, caffe2::TypeMeta dtype) {
  Tensor t = at::detail::make_tensor<c10::TensorImpl>(make_storage(device, nbytes), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return t;
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<c10::Device> device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  at::detail::check_size_nonnegative(sizes);
  const auto type = c10::scalarTypeToTypeMeta(c10::dtype_or_default(dtype));
  return new_tensor(device_index(device), sizes, strides, at::detail::computeStorageNbytes(sizes, strides, type.itemsize()), type);
}

Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<c10::Device> device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  at::detail::check_size_nonnegative(sizes);
  Tensor t = empty_strided(sizes, c10::contiguous_strides(sizes), dtype, layout, device, pin);
  if (format.has_value() && *format != at::MemoryFormat::Contiguous && *format != at::MemoryFormat::Preserve)
    t.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return t;
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  if (self.sizes() == sizes && !format.has_value()) return self;
  const auto strides = c10::contiguous_strides(sizes);
  const size_t nbytes = at::detail::computeStorageNbytes(sizes, strides, self.element_size(), size_t(self.storage_offset()));
  if (nbytes > self.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), nbytes);
  impl->set_sizes_and_strides(sizes, strides);
  if (format.has_value()) impl->empty_tensor_restride(*format);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  TORCH_CHECK(source.device() == self.device(), "Attempted to set the storage of a tensor on device \"", self.device(),
              "\" to a storage on different device \"", source.device(), "\"");
  const c10::DimVector dense = c10::contiguous_strides(sizes);
  const c10::IntArrayRef chosen = strides.size() == sizes.size() ? strides : c10::IntArrayRef(dense);
  const size_t nbytes = at::detail::computeStorageNbytes(sizes, chosen, self.element_size(), size_t(offset));
  if (nbytes > source.nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(source, nbytes);
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(sizes, chosen, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const int64_t n = int64_t(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, {n}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) {
  return set_storage(self, make_storage(self.device().index(), 0), 0, {0}, {1});
}

void record_stream(Tensor& self, c10::Stream stream) {
  const World::Lock lock;
  if (Block* block = block_of(self.storage())) World::get().record_stream(block, timeline_of(stream));
}

bool has_compatible_shallow_copy_type(const Tensor& self, const Tensor& from) {
  // `param.data = tensor` between host and device: both are plain strided tensors, so the swap is sound.
  return self.layout() == at::kStrided && from.layout() == at::kStrided;
}

// Nested tensors, which this leads to, are not simulated.
bool nested_tensor_from_mask_left_aligned(const Tensor&, const Tensor&) {
  return false;
}

int64_t fused_sdp_choice(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, double dropout, bool causal,
                         std::optional<double> scale, bool gqa) {
  // Without a choice of its own a device gets the unfused path, whose results differ from the CPU's in the last bits.
  return at::_fused_sdp_choice(q, k, v, mask, dropout, causal, scale, gqa);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("set_", &set_nothing);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("copy_", &copy_);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("record_stream", &record_stream);
  m.impl("_nested_tensor_from_mask_left_aligned", &nested_tensor_from_mask_left_aligned);
  m.impl("_has_compatible_shallow_copy_type", &has_compatible_shallow_copy_type);
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("copy_", &host_copy_);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FULL_IF_UNSET(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define FULL_APPENDED(...) KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE(__VA_ARGS__)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_IF_UNSET)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(FULL_APPENDED)
  AT_FORALL_PROMOTE(WIDEST)
#undef LOWER
#undef FULL_IF_UNSET
#undef FULL_APPENDED
#undef WIDEST
#undef FULL
}

}  // namespace

}  // namespace greenroom

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &greenroom::fused_sdp_choice)
}

namespace greenroom {

// Composite kernels would win over the fallback and decompose what the CPU does in one kernel, with other roundings. So every
// operator that has a CPU kernel gets the fallback by name, and so do composites that ask for the device's type.
void register_operators() {
  at::globalContext().lazyInitDevice(kSim);  // before it, torch asks no device whether memory is pinned
  static const std::set<std::string> ask_for_the_device = {"aten::convolution", "aten::convolution_backward", "aten::conj_physical_",
                                                           "aten::mode.values"};
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const auto op = dispatcher.findOp(name);
    if (!op.has_value() || op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    const std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    if (op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || ask_for_the_device.count(full))
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}

}  // namespace greenroom
