// Copies between host and device, and within each.
#include <ATen/ATen.h>
#include <ATen/ops/copy_native.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
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

Keep keep(const Tensor& t) {
  return {std::make_shared<c10::Storage>(t.storage()),
          [](const void* storage) { return static_cast<const c10::Storage*>(storage)->use_count() == 1; }};
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

void peer_copy(const Tensor& target, const Tensor& source) {
  const World::Lock lock;
  World& world = World::get();
  const int out = current_timeline(source.device().index()), in = current_timeline(target.device().index());
  Block *read = block_of(source.storage()), *written = block_of(target.storage());
  world.check_fault("copy");
  world.begin(out, "peer copy", {span_of(source, read, false)});
  world.begin(in, "peer copy", {span_of(target, written, true)});
  const size_t nbytes = size_t(source.numel()) * source.element_size();
  if (!read->dry && !written->dry) std::memcpy(data(target), data(source), nbytes);
  world.finish_peer_copy(out, in, nbytes);
}

// One run of bytes from anywhere to anywhere; both tensors lie alike.
void move_bytes(const Tensor& target, const Tensor& source, bool non_blocking) {
  if (!is_sim(source))
    host_to_device(target, source, non_blocking);
  else if (!is_sim(target))
    device_to_host(target, source, non_blocking);
  else
    peer_copy(target, source);
}
}  // namespace

// Copies as torch.cuda does them. Bytes that lie alike go straight. Otherwise they go through dense tensors, and another dtype is
// made on the host if the copy blocks, on the device if it does not (between devices, on the source).
Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.numel() == 0 || self.is_same(from)) return self;
  for (const Tensor& t : {self, from})
    TORCH_CHECK(t.storage().nbytes() > 0, "greenroom.sim: a copy uses a tensor of ", t.numel(),
                " elements whose storage was resized to nothing: its memory has been freed");
  const Tensor expanded = from.expand_as(self);
  if (is_sim(self) && is_sim(expanded) && self.device() == expanded.device()) {
    on_device(self, expanded);
    return self;
  }
  for (const Tensor& t : {self, expanded})
    TORCH_CHECK(is_sim(t) || t.device().is_cpu(), "greenroom.sim: cannot copy between ", self.device(), " and ", from.device());
  if (same_layout(self, expanded)) {
    move_bytes(self, expanded, non_blocking);
    return self;
  }
  const bool cast_first = is_sim(expanded) ? is_sim(self) || non_blocking : !non_blocking;
  Tensor source = expanded.resolve_conj().resolve_neg();
  if (cast_first) source = source.to(self.scalar_type());
  source = source.contiguous();
  if (same_layout(self, source)) {
    move_bytes(self, source, non_blocking);
    return self;
  }
  Tensor staging = at::empty(source.sizes(), source.options().device(self.device()).pinned_memory(false));
  move_bytes(staging, source, is_sim(self) && non_blocking);  // what the host has to rearrange, it has to wait for
  self.copy_(staging);
  return self;
}

// Whether nobody has ever written to the memory a tensor spans: then it reads as zeros, and has no pages yet.
bool is_untouched(const Tensor& t) {
  static const size_t page = size_t(::sysconf(_SC_PAGESIZE));
  const Span span = span_of(t, nullptr, false);
  const auto base = reinterpret_cast<uintptr_t>(t.storage().data());
  const uintptr_t first = (base + span.begin) / page, last = (base + span.end - 1) / page;
  std::vector<unsigned char> resident(last - first + 1);
  if (::mincore(reinterpret_cast<void*>(first * page), resident.size() * page, resident.data()) != 0) return false;
  return std::all_of(resident.begin(), resident.end(), [](unsigned char r) { return (r & 1) == 0; });
}

// Copies within host memory take the host's time too. In dry mode a large copy of memory that was never written, such as a
// full-size model's weights, is not done: its target would take real pages.
Tensor& host_copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (!inside_kernel() && self.device().is_cpu() && from.device().is_cpu() && self.layout() == at::kStrided) {
    const size_t nbytes = size_t(self.numel()) * self.element_size();
    const World::Lock lock;
    World::get().host_copy(nbytes);
    if (World::get().is_dry(nbytes) && World::get().is_dry(from.storage().nbytes()) && is_untouched(from)) return self;
  }
  return at::native::copy_(self, from, non_blocking);
}

}  // namespace greenroom
