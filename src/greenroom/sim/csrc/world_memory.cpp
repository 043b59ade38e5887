// The world's books on memory: device memory, and page-locked host memory.
#include <algorithm>
#include <cstdio>

#include "world.h"

namespace greenroom {

namespace {

constexpr int64_t kGranule = 512;  // torch's caching allocator rounds every request up to this

int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

int64_t power_of_two(int64_t n) {
  int64_t p = kGranule;
  while (p < n) p *= 2;
  return p;
}

std::string size_of(int64_t n) {
  char text[32];
  if (n < (1 << 20))
    std::snprintf(text, sizeof text, "%lld bytes", static_cast<long long>(n));
  else if (n < (1 << 30))
    std::snprintf(text, sizeof text, "%.2f MiB", double(n) / (1 << 20));
  else
    std::snprintf(text, sizeof text, "%.2f GiB", double(n) / (1 << 30));
  return text;
}

}  // namespace

// ---- device memory ------------------------------------------------------------------------------------------------------

bool World::has_to_foresee(int device) const {
  constexpr int64_t kPlenty = int64_t(2) << 30;  // operators rarely return more than this
  return faults_.count("device_alloc") > 0 || config_.capacity - devices_.at(device).memory.active.current < kPlenty;
}

void World::foresee(int device, int stream, const std::vector<int64_t>& sizes) {
  std::vector<Block*> blocks;
  const auto fault = faults_.find("device_alloc");
  const int64_t countdown = fault == faults_.end() ? 0 : fault->second;
  const Memory before = devices_.at(device).memory;
  const size_t traced = trace.size();
  const auto undo = [&] {
    for (Block* block : blocks) delete block;
    trace.resize(traced);
    Memory& memory = devices_.at(device).memory;
    const int64_t flushes = memory.flushes, ooms = memory.ooms;
    if (flushes == before.flushes) memory = before;  // else the cache is gone, and what is in use is as it was
    else {
      memory.allocated = before.allocated, memory.active = before.active, memory.requested = before.requested;
      memory.cached.clear();
      memory.reserved.current = before.active.current;
    }
    memory.flushes = flushes, memory.ooms = ooms;
  };
  try {
    for (const int64_t nbytes : sizes)
      if (nbytes > 0) blocks.push_back(allocate(device, stream, size_t(nbytes)));
  } catch (...) {
    undo();
    throw;
  }
  undo();
  if (countdown > 0) faults_["device_alloc"] = countdown;  // the real allocations will count
}

Block* World::allocate(int device, int stream, size_t nbytes) {
  Memory& memory = devices_.at(device).memory;
  const int64_t want = round_up(int64_t(nbytes), kGranule);
  check_fault("device_alloc");
  drop_held(device, false);
  int64_t& cache = memory.cached[stream];
  const bool reused = cache >= want;
  if (reused) {
    cache -= want;
  } else {
    int64_t fresh = want - cache;  // a cache smaller than the request still lends its bytes: no fragmentation is modelled
    if (memory.reserved.current + fresh > config_.capacity) {
      // What torch does before it gives up: wait for the blocks other streams hold, give every cached block back, try again.
      ++memory.flushes;
      empty_cache(device);
      fresh = want;
      if (memory.reserved.current + fresh > config_.capacity) {
        ++memory.ooms;
        throw OutOfMemory("sim out of memory. Tried to allocate " + size_of(want) + ". Device " + std::to_string(device) +
                          " has a capacity of " + size_of(config_.capacity) + ", of which " + size_of(memory.active.current) +
                          " is in use.");
      }
    }
    memory.cached[stream] = 0;
    memory.reserved.add(fresh);
  }
  memory.allocated.add(want);
  memory.active.add(want);
  memory.requested.add(int64_t(nbytes));
  ++memory.allocs;
  auto* block = new Block;
  block->device = device;
  block->stream = stream;
  block->nbytes = nbytes;
  block->charged = size_t(want);
  block->dry = is_dry(nbytes);
  // Bytes that come from the cache may still be in use by earlier work of their stream: for other streams the allocation is
  // like a write there, which they have to wait for.
  block->history.push_back({0, std::max<size_t>(nbytes, 1), reused ? Access{stream, at(stream).clock[stream], "allocation"} : Access{}, {}});
  note("memory", device, "memory", host_time_, 0, memory.active.current);
  return block;
}

void World::index(Block* block) {
  index_[block->ptr] = block;
}

Block* World::find(const void* ptr) {
  auto it = index_.upper_bound(static_cast<const char*>(ptr));
  if (it == index_.begin()) return nullptr;
  Block* block = std::prev(it)->second;
  return ptr < block->ptr + block->nbytes ? block : nullptr;
}

void World::release(Block* block) noexcept {
  const Lock lock;
  const auto indexed = index_.find(block->ptr);
  if (indexed != index_.end() && indexed->second == block) index_.erase(indexed);
  const Stream& home = at(block->stream);
  if (config_.races != "off") {
    for (const Segment& segment : block->history) {
      const auto check = [&](const Access& access) {
        if (access.stream == 0 || block->recorded.count(access.stream) || ordered(access, home)) return false;
        report("unordered-free", block->device, block->stream, "free", access, segment.end - segment.begin);
        return true;
      };
      if (check(segment.write)) break;
      if (std::any_of(segment.reads.begin(), segment.reads.end(), check)) break;
    }
  }
  Memory& memory = devices_[block->device].memory;
  memory.allocated.sub(int64_t(block->charged));
  memory.requested.sub(int64_t(block->nbytes));
  garbage_.push_back(std::move(block->owner));
  Picos until = 0;
  for (int stream : block->recorded) until = std::max(until, at(stream).time);
  if (until > host_time_)
    devices_[block->device].held.emplace_back(block, until);
  else
    give_back(block);
}

void World::give_back(Block* block) noexcept {
  Memory& memory = devices_[block->device].memory;
  memory.active.sub(int64_t(block->charged));
  memory.cached[block->stream] += int64_t(block->charged);
  note("memory", block->device, "memory", host_time_, 0, memory.active.current);
  delete block;
}

void World::drop_held(int device, bool wait) {
  auto& held = devices_.at(device).held;
  for (auto it = held.begin(); it != held.end();) {
    if (!wait && it->second > host_time_) {
      ++it;
      continue;
    }
    give_back(it->first);
    it = held.erase(it);
  }
}

void World::record_stream(Block* block, int stream) {
  if (stream != block->stream) block->recorded.insert(stream);
}

void World::empty_cache(int device) {
  // As torch does: what other streams hold is waited for, and cudaFree waits for all the device's work.
  Memory& memory = devices_.at(device).memory;
  const auto is_kept = [](const auto& entry) { return entry.second > 0; };
  if (!devices_.at(device).held.empty() || std::any_of(memory.cached.begin(), memory.cached.end(), is_kept)) sync_device(device);
  drop_held(device, true);
  for (auto& entry : memory.cached) {
    memory.reserved.sub(entry.second);
    entry.second = 0;
  }
}

// ---- pinned host memory -------------------------------------------------------------------------------------------------

Block* World::pin(size_t nbytes, bool in_place) {
  check_fault("pinned_alloc");
  const int64_t size = in_place ? int64_t(nbytes) : power_of_two(int64_t(nbytes));
  if (!in_place && pinned_free_[size] > 0) {
    --pinned_free_[size];
  } else {
    if (config_.pinned_capacity >= 0 && pinned.current + size > config_.pinned_capacity) empty_pinned_cache();
    if (config_.pinned_capacity >= 0 && pinned.current + size > config_.pinned_capacity)
      throw std::runtime_error("greenroom.sim: out of pinned host memory. Tried to lock " + size_of(size) + "; " +
                               size_of(pinned.current) + " of " + size_of(config_.pinned_capacity) + " are locked already.");
    pinned.add(size);
    const Picos cost = to_picos(config_.pin_s + double(size) / (in_place ? config_.register_bytes_per_s : config_.pin_bytes_per_s));
    note("pin", 0, "host", host_time_, cost, size);
    host_time_ += cost;
  }
  auto* block = new Block;
  block->device = -1;
  block->nbytes = nbytes;
  block->charged = size_t(size);
  block->dry = is_dry(nbytes);
  block->history.push_back({0, std::max<size_t>(nbytes, 1), Access{}, {}});
  return block;
}

void World::index_pinned(Block* block) {
  if (block->nbytes > 0) pinned_index_[block->ptr] = block;
}

void World::unpin(Block* block, bool in_place) noexcept {
  const Lock lock;
  auto it = pinned_index_.find(block->ptr);
  if (it != pinned_index_.end() && it->second == block) pinned_index_.erase(it);
  if (in_place) {
    // The allocator waits for copies in flight before it hands pinned memory out again; unregistering does not.
    for (const Transfer& transfer : transfers_)
      if (config_.races != "off" && transfer.host >= block->ptr && transfer.host < block->ptr + block->nbytes)
        report("unordered-free", at(transfer.stream).device, 0, "host_unregister", {transfer.stream, transfer.stamp, transfer.op}, transfer.nbytes);
    pinned.sub(int64_t(block->charged));
  } else {
    ++pinned_free_[int64_t(block->charged)];
  }
  garbage_.push_back(std::move(block->owner));
  delete block;
}

Block* World::find_pinned(const void* ptr) {
  auto it = pinned_index_.upper_bound(static_cast<const char*>(ptr));
  if (it == pinned_index_.begin()) return nullptr;
  Block* block = std::prev(it)->second;
  return ptr < block->ptr + block->nbytes ? block : nullptr;
}

bool World::any_pinned(const char* begin, size_t nbytes) const {
  const auto next = pinned_index_.lower_bound(begin + nbytes);
  if (next == pinned_index_.begin()) return false;
  const Block* block = std::prev(next)->second;
  return begin < block->ptr + block->nbytes;
}

int64_t World::pinned_cached() const {
  int64_t sum = 0;
  for (const auto& entry : pinned_free_) sum += entry.first * entry.second;
  return sum;
}

void World::empty_pinned_cache() {
  pinned.sub(pinned_cached());
  pinned_free_.clear();
}

}  // namespace greenroom
