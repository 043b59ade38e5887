// Operators. Every one runs the CPU's own kernel over the same bytes: its simulated arguments are given to the kernel as CPU
// tensors that share their memory (shadows), and what the kernel allocated becomes simulated memory without a copy. Views need
// no code of their own: a result that shares a shadow's storage is a view of the tensor behind it.
//
// In dry mode an operator that touches a dry tensor, or would make one, is given shadows on the meta device instead: shapes
// and views come out right, time and memory are accounted for, and nothing is computed. What comes out depends on the shapes
// that went in alone, so it is remembered: many meta kernels are slow Python, and a denoising loop repeats itself.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include "device.h"
#include "ops.h"

namespace greenroom {

using at::IValue;
using at::Tensor;
using torch::jit::Stack;

// ---- what an operator costs ---------------------------------------------------------------------------------------------

namespace {
std::unordered_map<int, double> flops_per_s;  // by ScalarType
}

void set_flops(const std::map<std::string, double>& by_dtype) {
  static const std::map<std::string, at::ScalarType> names = {
      {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
      {"float8_e4m3fn", at::kFloat8_e4m3fn}, {"float8_e5m2", at::kFloat8_e5m2}, {"int8", at::kChar}};
  flops_per_s.clear();
  for (const auto& entry : by_dtype) {
    auto it = names.find(entry.first);
    TORCH_CHECK(it != names.end(), "unknown dtype '", entry.first, "' among a profile's FLOP rates");
    flops_per_s[int(it->second)] = entry.second;
  }
}

namespace {

using Sizes = std::vector<std::vector<int64_t>>;  // of the tensor arguments, in order

double product(const std::vector<int64_t>& sizes, size_t from = 0) {
  double p = 1;
  for (size_t i = from; i < sizes.size(); ++i) p *= double(sizes[i]);
  return p;
}

double matmul(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  return 2 * product(a) * double(b.size() > 1 ? b.back() : 1);
}

// Multiply-adds count two. The formulas are those of torch.utils.flop_counter.
double flops_of(const std::string& op, const Sizes& in, const Sizes& out, const Stack& args) {
  if ((op == "aten::mm" || op == "aten::bmm" || op == "aten::mv" || op == "aten::dot" || op == "aten::_int_mm" ||
       op == "aten::_scaled_mm") && in.size() >= 2)
    return matmul(in[0], in[1]);
  if ((op == "aten::addmm" || op == "aten::baddbmm" || op == "aten::addbmm" || op == "aten::addmv" || op == "aten::addmm_" ||
       op == "aten::baddbmm_" || op == "aten::_addmm_activation") && in.size() >= 3)
    return matmul(in[1], in[2]);
  if (op == "aten::convolution" && in.size() >= 2 && !out.empty())  // weight: [out, in/groups, kernel...]; transposed: [in, out/groups, ...]
    return 2 * (args.size() > 6 && args[6].isBool() && args[6].toBool() ? product(in[0]) : product(out[0])) * product(in[1], 1);
  if (op == "aten::convolution_backward" && in.size() >= 3)
    return 2 * product(in[0]) * product(in[2], 1) * double(out.size());
  if (op.rfind("aten::_scaled_dot_product", 0) == 0 && in.size() >= 3 && in[0].size() == 4) {
    const bool backward = op.find("backward") != std::string::npos;  // five products instead of two; argument 0 is the gradient
    if (backward && in.size() < 4) return 0;
    const auto &q = in[backward], &k = in[1 + backward], &v = in[2 + backward];
    return (backward ? 5.0 : 2.0) * double(q[0]) * double(q[1]) * double(q[2]) * double(k[2]) * double(q[3] + v[3]);
  }
  return 0;
}

// Operators that read a few rows of their first argument, as many bytes as they return.
bool reads_rows(const std::string& op) {
  static const std::unordered_set<std::string> ops = {"aten::index_select", "aten::embedding", "aten::gather", "aten::index", "aten::take"};
  return ops.count(op) > 0;
}

// In-place operators that only write: everything else in place also reads what it changes.
bool only_writes(const std::string& op) {
  static const std::unordered_set<std::string> ops = {"aten::fill_", "aten::zero_", "aten::copy_", "aten::normal_",
                                                      "aten::uniform_", "aten::random_", "aten::bernoulli_", "aten::exponential_"};
  return ops.count(op) > 0;
}

// Operators whose result the host needs: on a real device they wait for the stream.
bool host_reads_result(const std::string& op) {
  static const std::unordered_set<std::string> ops = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
                                                      "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
                                                      "aten::unique_dim_consecutive", "aten::bincount"};
  return ops.count(op) > 0;
}

int64_t unique_bytes(const Tensor& t) {
  int64_t n = t.element_size();
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.stride(d) != 0 || t.size(d) == 0) n *= t.size(d);
  return n;
}

Span span_of(const Tensor& t, Block* block, bool write) {
  int64_t last = 1;
  for (int64_t d = 0; d < t.dim(); ++d) last += t.stride(d) * (t.size(d) - 1);
  const size_t item = t.element_size(), begin = size_t(t.storage_offset()) * item;
  return {block, begin, begin + (t.numel() == 0 ? 0 : size_t(last) * item), write};
}

// ---- what an operator returns, by the shapes of its arguments -----------------------------------------------------------

struct ResultShape {
  int argument;  // >= 0: this very argument is returned (counting argument tensors)
  int storage;   // >= 0: a view of this argument tensor's storage; < 0: of new storage number -1 - storage
  c10::DimVector sizes, strides;
  int64_t offset;
  at::ScalarType dtype;
  bool defined;
};

struct ResultShapes {
  bool known = false;                             // false: cannot be told from shapes, or not worth remembering
  std::vector<int64_t> new_storages;              // bytes
  std::vector<std::vector<ResultShape>> returns;  // a list for every return value
  std::vector<bool> is_list;
  bool any_above_limit = false;
};

std::unordered_map<std::string, ResultShapes> shape_cache;  // guarded by the world's lock

template <typename T>
void append(std::string& key, const T& value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// Appends all that a result's shape can depend on; false if there is an argument that cannot be compared.
bool append_value(std::string& key, const IValue& value, std::vector<const void*>& storages) {
  if (value.isTensor()) {
    const Tensor& t = value.toTensor();
    key += 'T';
    if (!t.defined()) return true;
    if (t.layout() != at::kStrided) return false;
    const void* storage = t.storage().unsafeGetStorageImpl();
    append(key, std::find(storages.begin(), storages.end(), storage) - storages.begin());
    storages.push_back(storage);
    append(key, t.dim());
    for (int64_t d = 0; d < t.dim(); ++d) append(key, t.size(d)), append(key, t.stride(d));
    append(key, t.storage_offset());
    append(key, t.storage().nbytes());
    append(key, t.scalar_type());
    append(key, t.device());
    append(key, char(t.is_conj() + 2 * t.is_neg() + 4 * t.unsafeGetTensorImpl()->is_wrapped_number()));
  } else if (value.isInt()) {
    key += 'i', append(key, value.toInt());
  } else if (value.isDouble()) {
    key += 'd', append(key, value.toDouble());
  } else if (value.isBool()) {
    key += value.toBool() ? 't' : 'f';
  } else if (value.isNone() || value.isGenerator()) {
    key += 'n';
  } else if (value.isDevice()) {
    key += 'D', append(key, value.toDevice());
  } else if (value.isString()) {
    key += 's' + value.toStringRef() + '\0';
  } else if (value.isList()) {
    key += 'L';
    append(key, value.toListRef().size());
    for (const IValue& item : value.toListRef())
      if (!append_value(key, item, storages)) return false;
  } else {
    return false;
  }
  return true;
}

// ---- one call -----------------------------------------------------------------------------------------------------------

bool is_sim(const Tensor& t) {
  return t.defined() && t.device().type() == kSim;
}

Tensor tensor_on(c10::Storage storage, const Tensor& like, c10::DispatchKey key) {
  Tensor t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return t;
}

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), schema_(op.schema()), name_(schema_.name()), stack_(*stack), base_(stack->size() - schema_.arguments().size()) {}

  void run();

 private:
  struct Shadow {
    Tensor sim, shadow;
    bool write;
  };

  template <typename F>
  void each_argument_tensor(F visit);
  void look_at(const Tensor& t, bool write, bool may_be_on_cpu);
  void execute(c10::DispatchKey key);
  void infer();
  ResultShapes describe() const;
  void zero_results();
  void return_shapes(const ResultShapes& shapes);
  c10::Storage new_storage(size_t nbytes, c10::DataPtr memory);
  Tensor shadow_of(const Tensor& t, bool write);
  IValue shadow_of(const IValue& value, bool write);
  void write_back(Shadow& shadow);
  Tensor adopt(const Tensor& result);
  IValue adopt(const IValue& value);
  Picos duration(const Stack& arguments) const;

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::string& name_;
  Stack& stack_;
  const size_t base_;
  int device_ = -1;
  bool skip_ = false, views_ = false, writes_ = false, host_index_ = false;
  at::ScalarType dtype_ = at::kFloat;
  bool dtype_known_ = false;
  Tensor on_cpu_;
  int64_t bytes_ = 0;
  Sizes in_, out_;
  std::vector<Span> spans_, fresh_;
  std::vector<Tensor> arguments_;  // simulated ones, in order
  std::vector<bool> written_;      // ... of which these are only written to
  std::vector<Shadow> shadows_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;  // simulated, shadow
};

template <typename F>
void Call::each_argument_tensor(F visit) {
  const auto& arguments = schema_.arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    const IValue& value = stack_[base_ + i];
    const bool write = arguments[i].alias_info() != nullptr && arguments[i].alias_info()->isWrite();
    if (value.isTensor()) {
      visit(value.toTensor(), write, false);
    } else if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) visit(t, write, false);
    } else if (value.isList() || value.isOptionalTensorList()) {
      for (const IValue& item : value.toListRef())
        if (item.isTensor()) visit(item.toTensor(), write, true);
    }
  }
}

void Call::look_at(const Tensor& t, bool write, bool may_be_on_cpu) {
  if (!t.defined()) return;
  if (!is_sim(t)) {
    // CUDA's rule: next to device tensors only single numbers and indices may live on the host, and never as the result.
    if ((t.dim() > 0 && !may_be_on_cpu) || (write && t.device().is_cpu())) on_cpu_ = t;
    return;
  }
  const int device = t.device().index();
  TORCH_CHECK(device_ < 0 || device_ == device, "Expected all tensors to be on the same device, but found at least two devices, sim:",
              device_, " and sim:", device, "! (when calling ", name_, ")");
  device_ = device;
  if (may_be_on_cpu && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte)) host_index_ = true;
  if (!dtype_known_ && flops_per_s.count(int(t.scalar_type()))) dtype_ = t.scalar_type(), dtype_known_ = true;
  if (Block* block = block_of(t.storage())) {
    spans_.push_back(span_of(t, block, write));
    skip_ = skip_ || block->dry;
  }
  if (!(reads_rows(name_) && in_.empty())) bytes_ += unique_bytes(t) * (write && name_.back() == '_' && !only_writes(name_) ? 2 : 1);
  in_.push_back(t.sizes().vec());
  arguments_.push_back(t);
  written_.push_back(write && (name_.back() != '_' || only_writes(name_)));
  writes_ = writes_ || write;
}

Tensor Call::shadow_of(const Tensor& t, bool write) {
  if (!t.defined()) return t;
  const auto key = skip_ ? c10::DispatchKey::Meta : c10::DispatchKey::CPU;
  if (!is_sim(t)) return skip_ && t.device().is_cpu() ? at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta)) : t;
  for (const Shadow& s : shadows_)
    if (s.sim.is_same(t)) return s.shadow;
  c10::Storage shadow;
  for (auto& pair : storages_)
    if (pair.first.is_alias_of(t.storage())) shadow = pair.second;
  if (!shadow) {
    const auto where = skip_ ? c10::Device(c10::kMeta) : c10::Device(c10::kCPU);
    void* data = skip_ ? nullptr : const_cast<void*>(t.storage().data());
    shadow = c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(), c10::DataPtr(data, where),
                          c10::GetAllocator(where.type()), true);
    storages_.emplace_back(t.storage(), shadow);
  }
  shadows_.push_back({t, tensor_on(shadow, t, key), write});
  return shadows_.back().shadow;
}

IValue Call::shadow_of(const IValue& value, bool write) {
  if (value.isTensor()) return shadow_of(value.toTensor(), write);
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(shadow_of(t, write));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t.has_value() ? std::optional<Tensor>(shadow_of(*t, write)) : std::nullopt);
    return list;
  }
  if (value.isDevice() && value.toDevice().type() == kSim) return skip_ ? c10::Device(c10::kMeta) : c10::Device(c10::kCPU);
  if (value.isGenerator()) {
    const at::Generator generator = value.toGenerator();
    TORCH_CHECK(generator.device().type() == kSim, "Expected a 'sim' device type for generator but found '", generator.device(), "'");
    return skip_ ? IValue() : IValue(cpu_generator(generator));
  }
  return value;
}

// A kernel may have resized a tensor it writes to (`out=`): then its shadow has other sizes, or even other memory.
void Call::write_back(Shadow& s) {
  c10::StorageImpl* sim = s.sim.storage().unsafeGetStorageImpl();
  c10::StorageImpl* shadow = s.shadow.storage().unsafeGetStorageImpl();
  if (shadow->nbytes() > sim->nbytes() || (!skip_ && shadow->data() != sim->data() && shadow->nbytes() > 0)) {
    const size_t nbytes = shadow->nbytes();
    c10::DataPtr memory = skip_ ? c10::DataPtr() : shadow->set_data_ptr(c10::DataPtr(nullptr, c10::kCPU));
    sim->set_data_ptr_noswap(make_block(device_, nbytes, std::move(memory)));
    sim->set_nbytes(nbytes);
  }
  if (s.sim.sizes() != s.shadow.sizes() || s.sim.strides() != s.shadow.strides())
    s.sim.unsafeGetTensorImpl()->set_sizes_and_strides(s.shadow.sizes(), s.shadow.strides(), s.shadow.storage_offset());
}

c10::Storage Call::new_storage(size_t nbytes, c10::DataPtr memory) {
  c10::Storage storage = make_storage(device_, nbytes, std::move(memory), /*zero=*/true);
  bytes_ += int64_t(nbytes) * (reads_rows(name_) ? 2 : 1);
  if (Block* block = block_of(storage)) fresh_.push_back({block, 0, block->nbytes, true});
  return storage;
}

Tensor Call::adopt(const Tensor& result) {
  if (!result.defined()) return result;
  for (const Shadow& s : shadows_)
    if (s.shadow.is_same(result)) return s.sim;
  if (!result.device().is_cpu() && !result.device().is_meta()) return result;
  c10::Storage home;
  for (auto& pair : storages_)
    if (pair.second.is_alias_of(result.storage())) home = pair.first;
  if (!home) {
    const size_t nbytes = result.storage().nbytes();
    c10::DataPtr memory;
    if (!skip_ && nbytes > 0) memory = result.storage().unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr(nullptr, c10::kCPU));
    home = new_storage(nbytes, std::move(memory));
    storages_.emplace_back(home, result.storage());
  }
  out_.push_back(result.sizes().vec());
  return tensor_on(home, result, c10::DispatchKey::PrivateUse1);
}

IValue Call::adopt(const IValue& value) {
  if (value.isTensor()) return adopt(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& t : value.toTensorVector()) list.push_back(adopt(t));
    return list;
  }
  return value;
}

Picos Call::duration(const Stack& arguments) const {
  const double flops = flops_of(name_, in_, out_, arguments);
  const auto rate = flops_per_s.find(int(dtype_));
  const double compute = rate == flops_per_s.end() ? 0 : flops / rate->second;
  return to_picos(std::max(compute, double(bytes_) / World::get().config().memory_bytes_per_s));
}

// Runs the operator on shadows of its arguments; its results, not yet adopted, are on the stack then.
void Call::execute(c10::DispatchKey key) {
  const auto& arguments = schema_.arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = stack_[base_ + i];
    const bool write = arguments[i].alias_info() != nullptr && arguments[i].alias_info()->isWrite();
    if (value.isNone() && !skip_ && arguments[i].name() == "generator")
      value = cpu_generator(default_generator(device_));
    else
      value = shadow_of(value, write);
  }
  op_.redispatchBoxed(c10::DispatchKeySet(key), &stack_);
}

// What execute() on the meta device has left on the stack, as a value.
ResultShapes Call::describe() const {
  ResultShapes shapes;
  for (const Shadow& s : shadows_)
    if (s.sim.sizes() != s.shadow.sizes() || s.sim.strides() != s.shadow.strides() ||
        s.shadow.storage().nbytes() > s.sim.storage().nbytes())
      return shapes;  // resized an argument: rare, and not remembered
  std::vector<const c10::StorageImpl*> fresh;
  const auto one = [&](const Tensor& t) {
    ResultShape r{-1, -1, {}, {}, 0, at::kFloat, t.defined()};
    if (!t.defined()) return r;
    r.sizes = t.sizes(), r.strides = t.strides(), r.offset = t.storage_offset(), r.dtype = t.scalar_type();
    const auto source = [&](auto matches) {
      for (const Shadow& s : shadows_)
        if (matches(s))
          for (size_t i = 0; i < arguments_.size(); ++i)
            if (arguments_[i].is_same(s.sim)) return int(i);
      return -1;
    };
    r.argument = source([&](const Shadow& s) { return s.shadow.is_same(t); });
    if (r.argument >= 0) return r;
    r.storage = source([&](const Shadow& s) { return s.shadow.storage().is_alias_of(t.storage()); });
    if (r.storage >= 0) return r;
    const c10::StorageImpl* impl = t.storage().unsafeGetStorageImpl();
    const auto at = std::find(fresh.begin(), fresh.end(), impl);
    r.storage = -1 - int(at - fresh.begin());
    if (at == fresh.end()) {
      fresh.push_back(impl);
      shapes.new_storages.push_back(int64_t(impl->nbytes()));
      shapes.any_above_limit = shapes.any_above_limit || World::get().is_dry(impl->nbytes());
    }
    return r;
  };
  for (size_t i = stack_.size() - schema_.returns().size(); i < stack_.size(); ++i) {
    const IValue& value = stack_[i];
    if (!value.isTensor() && !value.isTensorList()) return shapes;
    shapes.is_list.push_back(value.isTensorList());
    shapes.returns.emplace_back();
    if (value.isTensor())
      shapes.returns.back().push_back(one(value.toTensor()));
    else
      for (const Tensor& t : value.toTensorVector()) shapes.returns.back().push_back(one(t));
  }
  shapes.known = true;
  return shapes;
}

void Call::return_shapes(const ResultShapes& shapes) {
  std::vector<c10::Storage> fresh;
  for (const int64_t nbytes : shapes.new_storages) fresh.push_back(new_storage(size_t(nbytes), {}));
  stack_.erase(stack_.begin() + std::ptrdiff_t(base_), stack_.end());
  for (size_t i = 0; i < shapes.returns.size(); ++i) {
    c10::List<Tensor> list;
    for (const ResultShape& r : shapes.returns[i]) {
      Tensor t;
      if (r.argument >= 0) {
        t = arguments_[size_t(r.argument)];
      } else if (r.defined) {
        c10::Storage home = r.storage >= 0 ? arguments_[size_t(r.storage)].storage() : fresh[size_t(-1 - r.storage)];
        t = at::detail::make_tensor<c10::TensorImpl>(std::move(home), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::scalarTypeToTypeMeta(r.dtype));
        t.unsafeGetTensorImpl()->set_sizes_and_strides(r.sizes, r.strides, r.offset);
        out_.emplace_back(r.sizes.begin(), r.sizes.end());
      }
      list.push_back(t);
    }
    stack_.push_back(shapes.is_list[i] ? IValue(list) : IValue(list.get(0)));
  }
}

// Dry mode: finds out from shapes what the operator returns, and so whether it is done or skipped. When it is skipped, its
// results are on the stack afterwards.
void Call::infer() {
  std::string key;
  append(key, static_cast<const void*>(&op_.schema()));
  std::vector<const void*> storages;
  bool comparable = true;
  for (size_t i = base_; comparable && i < stack_.size(); ++i) comparable = append_value(key, stack_[i], storages);
  const bool touches_dry = skip_;
  if (comparable) {
    const World::Lock lock;
    const auto it = shape_cache.find(key);
    if (it != shape_cache.end()) {
      skip_ = touches_dry || it->second.any_above_limit;
      if (!skip_) return;
      if (it->second.known) return return_shapes(it->second);
    }
  }
  skip_ = true;
  const Stack inputs(stack_.begin() + std::ptrdiff_t(base_), stack_.end());
  ResultShapes shapes;
  try {
    execute(c10::DispatchKey::Meta);
    shapes = describe();
  } catch (const std::exception& error) {
    TORCH_CHECK(!touches_dry, "greenroom.sim: dry mode cannot skip ", name_, ", because torch cannot tell its result's shape without "
                "computing it (", error.what(), "). Raise dry_above in greenroom.sim.configure() above the size of its arguments.");
  }
  if (comparable) {
    const World::Lock lock;
    shape_cache[key] = shapes;
  }
  skip_ = touches_dry || shapes.any_above_limit;
  if (skip_) {
    for (Shadow& s : shadows_)
      if (s.write) write_back(s);
    for (size_t i = stack_.size() - schema_.returns().size(); i < stack_.size(); ++i) stack_[i] = adopt(stack_[i]);
  } else {
    shadows_.clear();
    storages_.clear();
    stack_.erase(stack_.begin() + std::ptrdiff_t(base_), stack_.end());
    stack_.insert(stack_.end(), inputs.begin(), inputs.end());
  }
}

// What was not computed reads as zero, also where it should have been written into a tensor that is real.
void Call::zero_results() {
  for (size_t i = 0; i < arguments_.size(); ++i) {
    const Tensor& t = arguments_[i];
    Block* block = block_of(t.storage());
    if (!written_[i] || block == nullptr || block->dry) continue;
    c10::Storage memory(c10::Storage::use_byte_size_t(), t.storage().nbytes(), c10::DataPtr(block->ptr, c10::kCPU), nullptr, false);
    tensor_on(std::move(memory), t, c10::DispatchKey::CPU).zero_();
  }
}

void Call::run() {
  each_argument_tensor([this](const Tensor& t, bool write, bool index) { look_at(t, write, index); });
  TORCH_CHECK(!on_cpu_.defined() || device_ < 0, "Expected all tensors to be on the same device, but found at least two devices, sim:",
              device_, " and ", on_cpu_.device(), "! (when calling ", name_, ")");
  for (size_t i = base_; i < stack_.size(); ++i)
    if (device_ < 0 && stack_[i].isDevice() && stack_[i].toDevice().type() == kSim)
      device_ = stack_[i].toDevice().has_index() ? stack_[i].toDevice().index() : current_device();
  if (device_ < 0) device_ = current_device();

  bool returns_tensor = false;
  for (const auto& result : schema_.returns()) {
    views_ = views_ || (result.alias_info() != nullptr && !result.alias_info()->isWrite());
    returns_tensor = returns_tensor || result.type()->isSubtypeOf(*c10::TensorType::get()) || result.type()->kind() == c10::TypeKind::ListType;
  }
  const bool to_host = host_reads_result(name_) || (host_index_ && name_ == "aten::index");
  const bool is_kernel = (!views_ && (returns_tensor || to_host)) || writes_;

  World& world = World::get();
  const int timeline = current_timeline(device_);
  if (is_kernel) {
    const World::Lock lock;
    world.check_fault("kernel");
    world.begin(timeline, name_.c_str(), spans_);
  }
  Stack inputs;  // the cost formulas look at the arguments after the call
  if (is_kernel) inputs.assign(stack_.begin() + std::ptrdiff_t(base_), stack_.end());

  // A view touches no memory, and who only asks for a number is told what dry memory reads as: zero.
  const bool computes = is_kernel && (returns_tensor || writes_);
  if (computes && world.config().dry_above >= 0) infer();
  if (!computes) skip_ = false;
  if (skip_) {
    zero_results();
  } else {
    execute(c10::DispatchKey::CPU);
    for (Shadow& s : shadows_)
      if (s.write) write_back(s);
    for (size_t i = stack_.size() - schema_.returns().size(); i < stack_.size(); ++i) stack_[i] = adopt(stack_[i]);
  }

  if (!is_kernel) return;
  const Picos cost = duration(inputs);
  const World::Lock lock;
  if (name_ == "aten::_local_scalar_dense") {  // item(): a copy of one number, through pinned memory of the driver's
    world.finish_copy(timeline, Link::d2h, "item", in_.empty() ? 0 : arguments_[0].element_size(), true, true);
    return;
  }
  world.finish_kernel(timeline, name_.c_str(), cost, fresh_);
  if (to_host) world.sync_stream(timeline);
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  Call(op, stack).run();
}

// ---- copies -------------------------------------------------------------------------------------------------------------

bool same_layout(const Tensor& a, const Tensor& b) {  // may be moved as one run of bytes
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.is_conj() == b.is_conj() && a.is_neg() == b.is_neg() &&
         a.is_non_overlapping_and_dense() && b.is_non_overlapping_and_dense() && (a.strides() == b.strides() || (a.is_contiguous() && b.is_contiguous()));
}

std::shared_ptr<void> keep(const Tensor& t) {
  return std::make_shared<c10::Storage>(t.storage());
}

char* data(const Tensor& t) {
  return static_cast<char*>(const_cast<void*>(t.storage().data())) + t.storage_offset() * int64_t(t.element_size());
}

void on_device(Tensor& target, const Tensor& source) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  Stack stack{target, source, false};
  fallback(op, &stack);
}

void host_to_device(const Tensor& target, const Tensor& source, bool non_blocking) {
  const size_t nbytes = size_t(source.numel()) * source.element_size();
  Block* block = block_of(target.storage());
  const World::Lock lock;
  World& world = World::get();
  Block* pinned = world.find_pinned(data(source));
  const int timeline = current_timeline(target.device().index());
  std::vector<Span> spans{span_of(target, block, true)};
  if (pinned) {
    const size_t at = size_t(data(source) - pinned->ptr);
    spans.push_back({pinned, at, at + nbytes, false});
  }
  const char* name = pinned ? "copy h2d pinned" : "copy h2d pageable";
  world.check_fault("copy");
  world.begin(timeline, name, spans);
  if (pinned) world.deliver_overlapping(timeline, data(source), nbytes);
  if (!block->dry) std::memcpy(data(target), data(source), nbytes);
  world.finish_copy(timeline, Link::h2d, name, nbytes, pinned != nullptr, !non_blocking);
  if (pinned && non_blocking && !block->dry) world.watch_source(timeline, name, data(source), nbytes, keep(source));
}

void device_to_host(const Tensor& target, const Tensor& source, bool non_blocking) {
  const size_t nbytes = size_t(source.numel()) * source.element_size();
  Block* block = block_of(source.storage());
  const World::Lock lock;
  World& world = World::get();
  Block* pinned = world.find_pinned(data(target));
  const int timeline = current_timeline(source.device().index());
  std::vector<Span> spans{span_of(source, block, false)};
  if (pinned) {
    const size_t at = size_t(data(target) - pinned->ptr);
    spans.push_back({pinned, at, at + nbytes, true});
  }
  const bool deferred = pinned != nullptr && non_blocking;
  const char* name = pinned ? "copy d2h pinned" : "copy d2h pageable";
  world.check_fault("copy");
  world.begin(timeline, name, spans);
  if (deferred && !(block->dry && world.is_dry(nbytes))) world.defer_delivery(timeline, name, data(target), data(source), nbytes, keep(target));
  // Into pageable memory the driver's copy returns only when it is done, whatever non_blocking says.
  world.finish_copy(timeline, Link::d2h, name, nbytes, pinned != nullptr, !deferred);
  if (!deferred && !(block->dry && world.is_dry(nbytes))) std::memcpy(data(target), data(source), nbytes);
}

void peer_copy(Tensor& target, const Tensor& source) {
  Tensor plain = at::empty(source.sizes(), source.options().device(target.device()));
  const Tensor from = source.contiguous();
  {
    const World::Lock lock;
    World& world = World::get();
    const int out = current_timeline(from.device().index()), in = current_timeline(target.device().index());
    Block *read = block_of(from.storage()), *written = block_of(plain.storage());
    world.check_fault("copy");
    world.begin(out, "peer copy", {span_of(from, read, false)});
    world.begin(in, "peer copy", {span_of(plain, written, true)});
    if (!read->dry && !written->dry) std::memcpy(data(plain), data(from), from.nbytes());
    world.finish_peer_copy(out, in, from.nbytes());
  }
  on_device(target, plain);
}

// Copies as torch.cuda does them: bytes that lie alike go straight; otherwise a dense staging tensor, converted on the device.
Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.numel() == 0 || self.is_same(from)) return self;
  const Tensor source = from.expand_as(self);
  if (is_sim(self) && is_sim(source)) {
    if (self.device() == source.device())
      on_device(self, source);
    else
      peer_copy(self, source);
  } else if (is_sim(self)) {
    TORCH_CHECK(source.device().is_cpu(), "greenroom.sim: cannot copy from ", source.device(), " to ", self.device());
    if (same_layout(self, source)) {
      host_to_device(self, source, non_blocking);
    } else {
      const Tensor dense = source.resolve_conj().resolve_neg().contiguous();
      Tensor staging = at::empty(dense.sizes(), dense.options().device(self.device()).pinned_memory(false));
      host_to_device(staging, dense, non_blocking);
      on_device(self, staging);
    }
  } else {
    TORCH_CHECK(self.device().is_cpu(), "greenroom.sim: cannot copy from ", source.device(), " to ", self.device());
    if (same_layout(self, source)) {
      device_to_host(self, source, non_blocking);
    } else {
      const Tensor staging = source.to(self.scalar_type()).resolve_conj().resolve_neg().contiguous();
      if (same_layout(self, staging)) {
        device_to_host(self, staging, non_blocking);
      } else {
        const Tensor host = at::empty(staging.sizes(), staging.options().device(at::kCPU));
        device_to_host(host, staging, false);
        self.copy_(host);
      }
    }
  }
  return self;
}

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

// ---- memory operators ---------------------------------------------------------------------------------------------------

int device_index(std::optional<c10::Device> device) {
  return device.has_value() && device->has_index() ? device->index() : current_device();
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
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  const c10::DimVector dense = c10::contiguous_strides(sizes);
  impl->set_sizes_and_strides(sizes, strides.size() == sizes.size() ? strides : c10::IntArrayRef(dense), offset);
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

Tensor pin_memory(const Tensor& self, std::optional<c10::Device>) {  // as torch's, but a dry run does not touch the bytes
  const size_t nbytes = at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.element_size());
  auto storage = c10::Storage(c10::Storage::use_byte_size_t(), nbytes, pinned_allocator()->allocate(nbytes), pinned_allocator(), false);
  Tensor result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(self.sizes(), self.strides());
  if (!World::get().is_dry(nbytes)) result.copy_(self);
  return result;
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
  m.impl("_has_compatible_shallow_copy_type", &has_compatible_shallow_copy_type);
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("_pin_memory", &pin_memory);
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
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
#undef LOWER
#undef FULL
}

}  // namespace

}  // namespace greenroom

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &greenroom::fused_sdp_choice)
}

namespace greenroom {

void forget_shapes() {
  const World::Lock lock;
  shape_cache.clear();
}

// Composite kernels would win over the fallback and decompose what the CPU does in one kernel, with other roundings. So every
// operator that has a CPU kernel gets the fallback by name, and the convolutions, whose composite asks for the device type.
void register_operators() {
  at::globalContext().lazyInitDevice(kSim);  // before it, torch asks no device whether memory is pinned
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const auto op = dispatcher.findOp(name);
    if (!op.has_value() || op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    const bool convolution = name.name == "aten::convolution" || name.name == "aten::convolution_backward";
    const bool own = name.name == "aten::_pin_memory";
    if ((op->hasKernelForDispatchKey(c10::DispatchKey::CPU) && !own) || (convolution && name.overload_name.empty())) {
      const std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      library.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&fallback>());
    }
  }
}

}  // namespace greenroom
