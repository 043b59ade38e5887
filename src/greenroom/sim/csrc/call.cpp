// Operators. Every one runs the CPU's own kernel over the same bytes: its simulated arguments are given to the kernel as CPU
// tensors that share their memory (shadows), and what the kernel allocated becomes simulated memory without a copy. Views need
// no code of their own: a result that shares a shadow's storage is a view of the tensor behind it.
//
// In dry mode an operator that touches a dry tensor, or would make one, is given shadows on the meta device instead: shapes
// and views come out right, time and memory are accounted for, and nothing is computed. What comes out depends on the shapes
// that went in alone, so it is remembered: many meta kernels are slow Python, and a denoising loop repeats itself.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>
#include <unordered_map>

#include "ops.h"

namespace greenroom {

using at::IValue;
using at::Tensor;
using torch::jit::Stack;

namespace {

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

Tensor tensor_on(c10::Storage storage, const Tensor& like, c10::DispatchKey key) {
  Tensor t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  return t;
}

thread_local bool in_kernel = false;

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
  bool writes(size_t argument) const;
  void look_at(const Tensor& t, bool write, bool may_be_on_cpu);
  void execute(c10::DispatchKey key);
  ResultShapes foresee();
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
  Tensor on_cpu_;                // one that should be on the device
  std::vector<Tensor> on_host_;  // all that are not
  int64_t bytes_ = 0;
  std::string no_shapes_;  // why torch could not tell them
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
    const bool write = writes(i);
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

bool Call::writes(size_t argument) const {
  const c10::Argument& a = schema_.arguments()[argument];
  if (a.alias_info() != nullptr && a.alias_info()->isWrite()) return true;
  return name_ == "aten::native_batch_norm" && a.name().rfind("running_", 0) == 0;  // its schema does not say so
}

void Call::look_at(const Tensor& t, bool write, bool may_be_on_cpu) {
  if (!t.defined()) return;
  if (!is_sim(t)) {
    on_host_.push_back(t);
    // CUDA's rule: next to device tensors only single numbers and indices may live on the host, and never as the result.
    if ((t.dim() > 0 && !may_be_on_cpu) || (write && t.device().is_cpu())) on_cpu_ = t;
    return;
  }
  const int device = t.device().index();
  TORCH_CHECK(device_ < 0 || device_ == device, "Expected all tensors to be on the same device, but found at least two devices, sim:",
              device_, " and sim:", device, "! (when calling ", name_, ")");
  device_ = device;
  if (may_be_on_cpu && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte)) host_index_ = true;
  if (!dtype_known_ && flops_rate(t.scalar_type()) > 0) dtype_ = t.scalar_type(), dtype_known_ = true;
  TORCH_CHECK(t.numel() == 0 || t.storage().nbytes() > 0, "greenroom.sim: ", name_, " uses a tensor of ", t.numel(),
              " elements whose storage was resized to nothing: its memory has been freed");
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
  for (Shadow& s : shadows_)
    if (s.sim.is_same(t)) {
      s.write = s.write || write;
      return s.shadow;
    }
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
  if (name_ == "aten::_fused_sdp_choice")  // a mask that needs a gradient decides
    shadows_.back().shadow.unsafeGetTensorImpl()->set_requires_grad(t.requires_grad());
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
  s.sim.unsafeGetTensorImpl()->_set_conj(s.shadow.is_conj());
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
  for (const Tensor& t : on_host_)
    if (t.storage().is_alias_of(result.storage())) return result;
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
  const double rate = flops_rate(dtype_);
  const double compute = rate > 0 ? flops / rate : 0;
  return to_picos(std::max(compute, double(bytes_) / World::get().config().memory_bytes_per_s));
}

// Runs the operator on shadows of its arguments; its results, not yet adopted, are on the stack then.
void Call::execute(c10::DispatchKey key) {
  const auto& arguments = schema_.arguments();
  bool has_generator = false;
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = stack_[base_ + i];
    const bool write = writes(i);
    has_generator = has_generator || arguments[i].name() == "generator";
    if (value.isNone() && !skip_ && arguments[i].name() == "generator")
      value = cpu_generator(default_generator(device_));
    else
      value = shadow_of(value, write);
  }
  struct Inside {
    const bool before = std::exchange(in_kernel, true);
    ~Inside() { in_kernel = before; }
  } inside;
  if (skip_ || !op_.hasTag(at::Tag::nondeterministic_seeded) || has_generator) {
    op_.redispatchBoxed(c10::DispatchKeySet(key), &stack_);
    return;
  }
  // The kernel draws from the CPU's default generator (dropout): for this call that is the device's.
  at::Generator cpu = at::detail::getDefaultCPUGenerator(), sim = cpu_generator(default_generator(device_));
  const auto state = cpu.get_state();
  cpu.set_state(sim.get_state());
  struct Restore {
    at::Generator cpu, sim;
    at::Tensor state;
    ~Restore() {
      sim.set_state(cpu.get_state());
      cpu.set_state(state);
    }
  } restore{cpu, sim, state};
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

// What the operator returns, told from shapes alone. The stack is as it was afterwards.
ResultShapes Call::foresee() {
  std::string key = name_ + "." + schema_.overload_name();
  append(key, c10::get_default_dtype().id());
  std::vector<const void*> storages;
  bool comparable = true;
  for (size_t i = base_; comparable && i < stack_.size(); ++i) comparable = append_value(key, stack_[i], storages);
  if (comparable) {
    const World::Lock lock;
    const auto it = shape_cache.find(key);
    if (it != shape_cache.end()) return it->second;
  }
  const Stack inputs(stack_.begin() + std::ptrdiff_t(base_), stack_.end());
  const bool before = std::exchange(skip_, true);
  ResultShapes shapes;
  try {
    execute(c10::DispatchKey::Meta);
    shapes = describe();
  } catch (const std::exception& error) {
    no_shapes_ = error.what();
  }
  skip_ = before;
  shadows_.clear();
  storages_.clear();
  stack_.erase(stack_.begin() + std::ptrdiff_t(base_), stack_.end());
  stack_.insert(stack_.end(), inputs.begin(), inputs.end());
  if (comparable && no_shapes_.empty()) {
    const World::Lock lock;
    shape_cache[key] = shapes;
  }
  return shapes;
}

// Dry mode: finds out from shapes whether the operator is done or skipped. When it is skipped, its results are on the stack
// afterwards.
void Call::infer() {
  const bool touches_dry = skip_;
  const ResultShapes shapes = foresee();
  skip_ = touches_dry || shapes.any_above_limit;
  if (!skip_) return;
  if (shapes.known) return return_shapes(shapes);
  TORCH_CHECK(no_shapes_.empty(), "greenroom.sim: dry mode cannot skip ", name_, ", because torch cannot tell its result's shape "
              "without computing it (", no_shapes_, "). Raise dry_above in greenroom.sim.configure() above the size of its arguments.");
  execute(c10::DispatchKey::Meta);
  for (Shadow& s : shadows_)
    if (s.write) write_back(s);
  for (size_t i = stack_.size() - schema_.returns().size(); i < stack_.size(); ++i) stack_[i] = adopt(stack_[i]);
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
    TORCH_CHECK(!stack_[i].isGenerator() || device_ >= 0 || on_host_.empty(), "Expected a 'cpu' device type for generator but found '",
                stack_[i].toGenerator().device().type(), "'");
  for (size_t i = base_; i < stack_.size(); ++i)
    if (device_ < 0 && stack_[i].isDevice() && stack_[i].toDevice().type() == kSim)
      device_ = stack_[i].toDevice().has_index() ? stack_[i].toDevice().index() : current_device();
  if (device_ < 0) device_ = current_device();

  bool returns_tensor = false;
  for (const auto& result : schema_.returns()) {
    views_ = views_ || (result.alias_info() != nullptr && !result.alias_info()->isWrite());
    returns_tensor = returns_tensor || result.type()->isSubtypeOf(*c10::TensorType::get()) || result.type()->kind() == c10::TypeKind::ListType;
  }
  const bool to_host = host_reads_result(name_) || (host_index_ && (name_ == "aten::index" || name_ == "aten::index_put_" || name_ == "aten::_index_put_impl_"));
  const bool is_kernel = (!views_ && (returns_tensor || to_host)) || writes_;

  World& world = World::get();
  const int timeline = current_timeline(device_);
  if (is_kernel) {
    const World::Lock lock;
    world.check_fault(name_ == "aten::_local_scalar_dense" ? "copy" : "kernel");
    world.begin(timeline, interned(name_), spans_);
  }
  Stack inputs;  // the cost formulas look at the arguments after the call
  if (is_kernel) inputs.assign(stack_.begin() + std::ptrdiff_t(base_), stack_.end());

  // A view touches no memory, and who only asks for a number is told what dry memory reads as: zero.
  const bool computes = is_kernel && (returns_tensor || writes_);
  if (computes && world.config().dry_above >= 0) infer();
  if (!computes) skip_ = false;
  if (computes && !skip_) {
    bool tight = false;
    {
      const World::Lock lock;
      tight = world.has_to_foresee(device_);
    }
    if (tight) {  // a refusal must come before the kernel has changed a buffer or drawn a number
      const std::vector<int64_t> sizes = foresee().new_storages;
      const World::Lock lock;
      try {
        world.foresee(device_, timeline, sizes);
      } catch (const OutOfMemory& error) {
        TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
      }
    }
  }
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
  world.finish_kernel(timeline, interned(name_), cost, fresh_);
  if (to_host) world.sync_stream(timeline);
}

}  // namespace

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  Call(op, stack).run();
}

bool inside_kernel() {
  return in_kernel;
}

void forget_shapes() {
  const World::Lock lock;
  shape_cache.clear();
}

}  // namespace greenroom
