// The Python face of the simulated machine, as operators of torch's: so it needs no Python headers to compile.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "device.h"
#include "ops.h"

namespace {

using greenroom::Block;
using greenroom::Config;
using greenroom::World;
using Numbers = c10::Dict<std::string, double>;

// Every copy in flight ends, and by the end of the lock its host memory is let go: a reset finds all of the pinned cache.
void settle_all() {
  const World::Lock lock;
  for (int d = 0; d < World::get().config().devices; ++d) World::get().settle_device(d);
}

// All numbers as float64: bytes are exact in it up to 2^53.
void configure(const Numbers& values, const Numbers& flops, const std::string& races) {
  Config c;
  c.devices = int(values.at("devices"));
  c.capacity = int64_t(values.at("capacity"));
  c.pinned_capacity = int64_t(values.at("pinned_capacity"));
  c.dry_above = int64_t(values.at("dry_above"));
  c.memory_bytes_per_s = values.at("memory_bytes_per_s");
  c.launch_s = values.at("launch_s");
  c.kernel_s = values.at("kernel_s");
  c.h2d_pinned = values.at("h2d_pinned");
  c.d2h_pinned = values.at("d2h_pinned");
  c.h2d_pageable = values.at("h2d_pageable");
  c.d2h_pageable = values.at("d2h_pageable");
  c.copy_latency_s = values.at("copy_latency_s");
  c.pin_bytes_per_s = values.at("pin_bytes_per_s");
  c.register_bytes_per_s = values.at("register_bytes_per_s");
  c.pin_s = values.at("pin_s");
  c.inline_copy_bytes = values.at("inline_copy_bytes");
  c.host_copy_bytes_per_s = values.at("host_copy_bytes_per_s");
  c.trace = values.at("trace") != 0;
  c.races = races;
  std::map<std::string, double> rates;
  for (const auto& entry : flops) rates[entry.key()] = entry.value();
  settle_all();
  const World::Lock lock;
  greenroom::set_flops(rates);
  greenroom::forget_shapes();
  World::get().configure(c);
}

void reset() {
  settle_all();
  const World::Lock lock;
  World::get().reset();
}

c10::Dict<std::string, int64_t> counters(int64_t device) {
  const World::Lock lock;
  World& world = World::get();
  const greenroom::Counters& c = world.counters(int(device));
  const greenroom::Memory& memory = world.memory(int(device));
  c10::Dict<std::string, int64_t> result;
  result.insert("now_ps", world.now());
  result.insert("epoch", int64_t(world.epoch()));
  result.insert("kernels", c.kernels);
  result.insert("syncs", c.syncs);
  result.insert("h2d_bytes", c.h2d_bytes);
  result.insert("d2h_bytes", c.d2h_bytes);
  result.insert("peer_bytes", c.peer_bytes);
  result.insert("h2d_copies", c.h2d_copies);
  result.insert("d2h_copies", c.d2h_copies);
  result.insert("compute_ps", c.compute_busy);
  result.insert("h2d_ps", c.h2d_busy);
  result.insert("d2h_ps", c.d2h_busy);
  result.insert("peak_bytes", memory.active.peak);
  result.insert("peak_reserved_bytes", memory.reserved.peak);
  return result;
}

void reset_peak(int64_t device) {
  const World::Lock lock;
  auto& memory = World::get().memory(int(device));
  for (auto* gauge : {&memory.active, &memory.reserved}) gauge->forget_peak();
}

std::tuple<int64_t, int64_t> take_peak(int64_t device) {
  const World::Lock lock;
  auto& memory = World::get().memory(int(device));
  const auto taken = std::make_tuple(memory.active.peak, memory.reserved.peak);
  for (auto* gauge : {&memory.active, &memory.reserved}) gauge->forget_peak();
  return taken;
}

void raise_peak(int64_t device, int64_t active, int64_t reserved) {
  const World::Lock lock;
  auto& memory = World::get().memory(int(device));
  memory.active.peak = std::max(memory.active.peak, active);
  memory.reserved.peak = std::max(memory.reserved.peak, reserved);
}

std::map<int64_t, Block*>& registered() {
  static auto* blocks = new std::map<int64_t, Block*>;
  return *blocks;
}

void host_register(int64_t address, int64_t nbytes) {
  const World::Lock lock;
  World& world = World::get();
  TORCH_CHECK_VALUE(!world.any_pinned(reinterpret_cast<char*>(address), size_t(nbytes)), "this host memory is page-locked already");
  Block* block = world.pin(size_t(nbytes), true);
  block->ptr = reinterpret_cast<char*>(address);
  world.index_pinned(block);
  registered()[address] = block;
}

void host_unregister(int64_t address) {
  const World::Lock lock;
  const auto it = registered().find(address);
  TORCH_CHECK_VALUE(it != registered().end(), "this host memory was not registered");
  World::get().unpin(it->second, true);
  registered().erase(it);
}

// Rows as lists side by side: texts and numbers, so many of each in a row.
using Table = std::tuple<std::vector<std::string>, std::vector<int64_t>>;

Table races() {  // kind, op, other op; device, stream, other stream, bytes
  const World::Lock lock;
  Table table;
  auto& [texts, numbers] = table;
  for (const greenroom::Race& r : World::get().races) {
    texts.insert(texts.end(), {r.kind, r.op, r.other_op});
    numbers.insert(numbers.end(), {r.device, r.stream, r.other_stream, int64_t(r.nbytes)});
  }
  return table;
}

Table trace() {  // name, lane; device, start, duration (picoseconds), bytes
  const World::Lock lock;
  Table table;
  auto& [texts, numbers] = table;
  for (const greenroom::TraceRow& r : World::get().trace) {
    texts.insert(texts.end(), {r.name, r.lane});
    numbers.insert(numbers.end(), {r.device, r.start, r.duration, r.value});
  }
  return table;
}

template <typename F>
auto locked(F f) {
  const World::Lock lock;
  return f(World::get());
}

TORCH_LIBRARY(greenroom_sim, m) {
  m.def("register_operators() -> ()", &greenroom::register_operators);
  m.def("configure(Dict(str, float) values, Dict(str, float) flops, str races) -> ()", &configure);
  m.def("reset() -> ()", &reset);
  m.def("settle_device(int device) -> ()", [](int64_t device) { locked([&](World& w) { w.settle_device(int(device)); }); });
  m.def("now_ps() -> int", [] { return locked([](World& w) { return w.now(); }); });
  m.def("counters(int device) -> Dict(str, int)", &counters);
  m.def("reset_peak(int device) -> ()", &reset_peak);
  m.def("take_peak(int device) -> (int, int)", &take_peak);
  m.def("raise_peak(int device, int active, int reserved) -> ()", &raise_peak);
  m.def("default_generator(int device) -> Generator?", [](int64_t device) { return greenroom::default_generator(int(device)); });
  m.def("device_count() -> int", [] { return locked([](World& w) { return int64_t(w.config().devices); }); });
  m.def("pinned_bytes() -> (int, int, int)", [] {
    return locked([](World& w) { return std::make_tuple(w.pinned.current, w.pinned.peak, w.pinned_cached()); });
  });
  m.def("fail(str kind, int nth) -> ()", [](const std::string& kind, int64_t nth) { locked([&](World& w) { w.fail(kind, nth); }); });
  m.def("slow_link(int device, str direction, float factor) -> ()", [](int64_t device, const std::string& direction, double factor) {
    locked([&](World& w) { w.slow_link(int(device), direction, factor); });
  });
  m.def("host_register(int address, int nbytes) -> ()", &host_register);
  m.def("host_unregister(int address) -> ()", &host_unregister);
  m.def("races() -> (str[], int[])", &races);
  m.def("trace() -> (str[], int[])", &trace);
}

}  // namespace
