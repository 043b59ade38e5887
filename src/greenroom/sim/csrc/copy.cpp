// Copies between host and device, and within each.
#include <ATen/ATen.h>
#include <ATen/ops/copy_native.h>

#include <cstring>

#include "ops.h"

namespace greenroom {

using at::Tensor;
using torch::jit::Stack;

namespace {

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

}  // namespace

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

// Copies within host memory take the host's time too; in dry mode large ones are not done, like everything large.
Tensor& host_copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (!inside_kernel() && self.device().is_cpu() && from.device().is_cpu() && self.layout() == at::kStrided) {
    const size_t nbytes = size_t(self.numel()) * self.element_size();
    const World::Lock lock;
    World::get().host_copy(nbytes);
    if (World::get().is_dry(nbytes)) return self;
  }
  return at::native::copy_(self, from, non_blocking);
}

}  // namespace greenroom
