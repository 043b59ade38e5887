#include "world.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace greenroom {

namespace {

// Smaller copies within host memory cost nothing, like all else that the host's own code does.
constexpr size_t kHostWork = size_t(64) << 10;

uint64_t checksum(const char* bytes, size_t n) {
  uint64_t h = 1469598103934665603ull, word = 0;
  for (; n >= 8; n -= 8, bytes += 8) {
    std::memcpy(&word, bytes, 8);
    h = (h ^ word) * 0x9E3779B97F4A7C15ull;
    h ^= h >> 29;
  }
  for (; n > 0; --n, ++bytes) h = (h ^ uint8_t(*bytes)) * 1099511628211ull;
  return h;
}

}  // namespace

const char* interned(const std::string& name) {
  static std::mutex mutex;
  static auto* names = new std::set<std::string>;
  std::lock_guard<std::mutex> lock(mutex);
  return names->insert(name).first->c_str();
}

Picos to_picos(double seconds) {
  return std::llround(seconds * 1e12);
}

// ---- clocks -------------------------------------------------------------------------------------------------------------

void Clock::set(size_t i, uint64_t v) {
  if (i >= at_.size()) at_.resize(i + 1);
  at_[i] = v;
}

void Clock::join(const Clock& other) {
  if (other.at_.size() > at_.size()) at_.resize(other.at_.size());
  for (size_t i = 0; i < other.at_.size(); ++i) at_[i] = std::max(at_[i], other.at_[i]);
}

void Gauge::add(int64_t n) {
  current += n;
  total += n;
  peak = std::max(peak, current);
}

Picos Engine::reserve(Picos ready, Picos duration, Picos now) {
  // No later call can ask for a time before `now` (work is ready after it is issued), so what ended by then is history.
  while (!busy_.empty() && busy_.begin()->second <= now) busy_.erase(busy_.begin());
  Picos start = ready;
  auto next = busy_.upper_bound(ready);
  if (next != busy_.begin()) start = std::max(start, std::prev(next)->second);
  for (; next != busy_.end() && next->first < start + duration; ++next) start = std::max(start, next->second);
  const auto before = next == busy_.begin() ? busy_.end() : std::prev(next);
  Picos end = start + duration;
  if (next != busy_.end() && next->first == end) {  // grow into the neighbours, to keep the map small
    end = next->second;
    busy_.erase(next);
  }
  if (before != busy_.end() && before->second == start)
    before->second = end;
  else
    busy_.emplace(start, end);
  return start;
}

World& World::get() {
  static World* world = new World;  // never destroyed: tensors may outlive static destruction
  return *world;
}

World::Lock::Lock() : world_(World::get()) {
  world_.mutex_.lock();
  ++world_.depth_;
}

World::Lock::~Lock() {
  std::vector<std::shared_ptr<void>> garbage;
  if (--world_.depth_ == 0) garbage.swap(world_.garbage_);
  world_.mutex_.unlock();
}

World::World() {
  streams_.push_back(std::make_unique<Stream>(Stream{-1, -1}));
  configure(Config{});
}

void World::configure(const Config& config) {
  if (!devices_.empty()) reset();
  config_ = config;
  // Devices are only ever added: tensors and streams of one that is no longer counted must still find their accounts.
  while (int(devices_.size()) < config.devices) {
    devices_.emplace_back();
    new_stream(int(devices_.size()) - 1);
  }
}

void World::reset() {
  for (size_t d = 0; d < devices_.size(); ++d) settle_device(int(d));
  ++epoch_;
  host_time_ = 0;
  for (auto& stream : streams_) stream->time = 0;
  for (size_t d = 0; d < devices_.size(); ++d) {
    Device& device = devices_[d];
    drop_held(int(d), true);
    device.compute.clear();
    device.h2d.clear();
    device.d2h.clear();
    device.h2d_slow = device.d2h_slow = 1;
    device.counters = Counters{};
    Memory& memory = device.memory;
    memory.cached.clear();
    memory.reserved.current = memory.active.current;
    for (Gauge* gauge : {&memory.allocated, &memory.active, &memory.reserved, &memory.requested})
      gauge->forget_peak(), gauge->forget_total();
    memory.allocs = memory.ooms = memory.flushes = 0;
  }
  empty_pinned_cache();
  pinned.forget_peak(), pinned.forget_total();
  faults_.clear();
  races.clear();
  trace.clear();
  pending_error_.clear();
}

void World::note(const std::string& name, int device, const char* lane, Picos start, Picos duration, int64_t value) {
  if (config_.trace) trace.push_back({name, device, lane, start, duration, value});
}

void World::fail(const std::string& kind, int64_t nth) {
  faults_[kind] = nth;
}

void World::check_fault(const std::string& kind) {
  auto it = faults_.find(kind);
  if (it == faults_.end() || --it->second > 0) return;
  faults_.erase(it);
  if (kind == "device_alloc") throw OutOfMemory("sim out of memory (injected fault: device_alloc)");
  throw std::runtime_error("greenroom.sim: injected fault: " + kind);
}

void World::slow_link(int device, const std::string& direction, double factor) {
  if (direction != "d2h") devices_.at(device).h2d_slow = factor;
  if (direction != "h2d") devices_.at(device).d2h_slow = factor;
}

// ---- streams, events, waiting -------------------------------------------------------------------------------------------

int World::new_stream(int device) {
  auto& streams = devices_.at(device).streams;
  streams_.push_back(std::make_unique<Stream>(Stream{device, int(streams.size())}));
  streams.push_back(int(streams_.size()) - 1);
  return streams.back();
}

int World::stream_of(int device, int index) {
  return devices_.at(device).streams.at(index);
}

void World::catch_up(Stream& stream) {
  if (stream.host_seen == host_version_) return;
  stream.clock.join(host_clock_);
  stream.host_seen = host_version_;
}

void World::record(Event& event, int timeline) {
  Stream& stream = at(timeline);
  stream.time = std::max(stream.time, host_time_);
  catch_up(stream);
  event.time = stream.time;
  event.clock = stream.clock;
  event.stream = timeline;
  event.epoch = epoch_;
}

void World::wait(const Event& event, int timeline) {
  if (event.stream == 0) return;
  Stream& stream = at(timeline);
  if (event.epoch == epoch_) stream.time = std::max(stream.time, event.time);
  stream.clock.join(event.clock);
}

void World::host_waits_until(Picos time, const Clock& clock) {
  if (time > host_time_) note("wait", 0, "host", host_time_, time - host_time_, 0);
  host_time_ = std::max(host_time_, time);
  host_clock_.join(clock);
  ++host_version_;
  settle();
}

bool World::query(const Event& event) {
  if (event.stream == 0) return true;
  host_time_ += to_picos(config_.launch_s);  // so that a loop that polls gets anywhere
  if (event.epoch == epoch_ && event.time > host_time_) return false;
  host_waits_until(0, event.clock);
  return true;
}

bool World::query_stream(int timeline) {
  host_time_ += to_picos(config_.launch_s);
  if (at(timeline).time > host_time_) return false;
  host_waits_until(0, at(timeline).clock);
  return true;
}

void World::sync_event(const Event& event) {
  if (event.stream == 0) return;
  ++devices_.at(at(event.stream).device).counters.syncs;
  host_waits_until(event.epoch == epoch_ ? event.time : 0, event.clock);
  raise_if_asked();
}

void World::sync_stream(int timeline) {
  ++devices_.at(at(timeline).device).counters.syncs;
  host_waits_until(at(timeline).time, at(timeline).clock);
  raise_if_asked();
}

void World::sync_device(int device) {
  ++devices_.at(device).counters.syncs;
  settle_device(device);
  raise_if_asked();
}

void World::settle_device(int device) {
  Clock clock;
  Picos time = 0;
  for (int timeline : devices_[device].streams) {
    time = std::max(time, at(timeline).time);
    clock.join(at(timeline).clock);
  }
  host_waits_until(time, clock);
}

// ---- races --------------------------------------------------------------------------------------------------------------

bool World::ordered(const Access& access, const Stream& stream) const {
  return access.stream == 0 || stream.clock[access.stream] >= access.stamp || host_clock_[access.stream] >= access.stamp;
}

void World::report(const char* kind, int device, int timeline, const char* op, const Access& other, size_t nbytes) {
  races.push_back({kind, op, other.op, device, at(timeline).index, at(other.stream).index, nbytes});
  if (config_.races == "raise" && pending_error_.empty())
    pending_error_ = std::string("RaceError: ") + kind + ": '" + op + "' and '" + other.op + "' (stream " +
                     std::to_string(at(other.stream).index) + ") touch the same " + std::to_string(nbytes) +
                     " bytes and nothing orders them. Let one stream wait for the other's event, or the host synchronise.";
}

void World::raise_if_asked() {
  if (pending_error_.empty()) return;
  const std::string text = std::move(pending_error_);
  pending_error_.clear();
  throw std::runtime_error(text);
}

void World::check(const Stream& stream, int timeline, const Span& span, const char* op) {
  for (const Segment& segment : span.block->history) {
    const size_t begin = std::max(segment.begin, span.begin), end = std::min(segment.end, span.end);
    if (begin >= end) continue;
    const auto clashes = [&](const Access& other) {
      if (ordered(other, stream)) return false;
      report(span.write ? "unordered-write" : "unordered-read", stream.device, timeline, op, other, end - begin);
      return true;
    };
    if (clashes(segment.write)) return;  // one report for an operand is enough
    if (span.write && std::any_of(segment.reads.begin(), segment.reads.end(), clashes)) return;
  }
}

void World::touch(const Stream& stream, int timeline, const Span& span, const char* op) {
  const Access access{timeline, stream.clock[timeline], op};
  std::vector<Segment> result;
  bool placed = false;
  for (Segment& segment : span.block->history) {
    const size_t begin = std::max(segment.begin, span.begin), end = std::min(segment.end, span.end);
    if (begin >= end) {
      result.push_back(std::move(segment));
      continue;
    }
    if (segment.begin < begin) result.push_back({segment.begin, begin, segment.write, segment.reads});
    if (span.write) {
      if (!placed) result.push_back({span.begin, span.end, access, {}});
      placed = true;
    } else {
      Segment middle{begin, end, segment.write, segment.reads};
      auto mine = std::find_if(middle.reads.begin(), middle.reads.end(), [&](const Access& r) { return r.stream == timeline; });
      if (mine != middle.reads.end())
        *mine = access;
      else
        middle.reads.push_back(access);
      result.push_back(std::move(middle));
    }
    if (end < segment.end) result.push_back({end, segment.end, segment.write, segment.reads});
  }
  span.block->history = std::move(result);
}

// ---- work ---------------------------------------------------------------------------------------------------------------

void World::begin(int timeline, const char* op, const std::vector<Span>& spans) {
  raise_if_asked();
  Stream& stream = at(timeline);
  catch_up(stream);
  stream.clock.set(timeline, stream.clock[timeline] + 1);
  if (config_.races == "off") return;
  for (const Span& span : spans) check(stream, timeline, span, op);
  raise_if_asked();  // before anything is written down: a refused operation has not been
  for (const bool write : {false, true})
    for (const Span& span : spans)
      if (span.write == write) touch(stream, timeline, span, op);
}

void World::finish_kernel(int timeline, const char* op, Picos duration, const std::vector<Span>& fresh) {
  Stream& stream = at(timeline);
  Device& device = devices_.at(stream.device);
  if (config_.races != "off")
    for (const Span& span : fresh) touch(stream, timeline, span, op);
  host_time_ += to_picos(config_.launch_s);
  duration = std::max(duration, to_picos(config_.kernel_s));
  const Picos start = device.compute.reserve(std::max(stream.time, host_time_), duration, host_time_);
  stream.time = start + duration;
  device.counters.kernels += 1;
  device.counters.compute_busy += duration;
  if (config_.trace) note(op, stream.device, ("stream " + std::to_string(stream.index)).c_str(), start, duration, 0);
}

Picos World::finish_copy(int timeline, Link link, const char* op, size_t nbytes, bool pinned_copy, bool blocking) {
  Stream& stream = at(timeline);
  Device& device = devices_.at(stream.device);
  const bool down = link == Link::h2d;
  const double rate = down ? (pinned_copy ? config_.h2d_pinned : config_.h2d_pageable)
                           : (pinned_copy ? config_.d2h_pinned : config_.d2h_pageable);
  const Picos duration = to_picos(config_.copy_latency_s + double(nbytes) / rate * (down ? device.h2d_slow : device.d2h_slow));
  host_time_ += to_picos(config_.launch_s);
  Picos start = std::max(stream.time, host_time_);
  // A small pageable copy travels with its command, past what waits for the engine.
  const bool travels_inline = down && !pinned_copy && double(nbytes) <= config_.inline_copy_bytes;
  if (!travels_inline) start = (down ? device.h2d : device.d2h).reserve(start, duration, host_time_);
  stream.time = start + duration;
  Counters& counters = device.counters;
  (down ? counters.h2d_bytes : counters.d2h_bytes) += int64_t(nbytes);
  (down ? counters.h2d_copies : counters.d2h_copies) += 1;
  (down ? counters.h2d_busy : counters.d2h_busy) += duration;
  note(op, stream.device, down ? "h2d" : "d2h", start, duration, int64_t(nbytes));
  if (blocking) {
    ++counters.syncs;
    host_waits_until(stream.time, stream.clock);
  } else if (!pinned_copy) {
    // The driver stages pageable memory piece by piece: the host is held, but has no promise that the last piece arrived.
    host_time_ = std::max(host_time_, stream.time);
  }
  return stream.time;
}

void World::host_copy(size_t nbytes) {
  if (nbytes < kHostWork) return;
  const Picos duration = to_picos(double(nbytes) / config_.host_copy_bytes_per_s);
  note("host copy", 0, "host", host_time_, duration, int64_t(nbytes));
  host_time_ += duration;
}

void World::finish_peer_copy(int from, int to, size_t nbytes) {
  Stream &source = at(from), &target = at(to);
  Device &sender = devices_.at(source.device), &receiver = devices_.at(target.device);
  const double bytes_per_s = std::min(config_.d2h_pinned / sender.d2h_slow, config_.h2d_pinned / receiver.h2d_slow);
  const Picos duration = to_picos(config_.copy_latency_s + double(nbytes) / bytes_per_s);
  host_time_ += to_picos(config_.launch_s);
  const Picos ready = std::max({source.time, target.time, host_time_});
  const Picos left = sender.d2h.reserve(ready, duration, host_time_);
  const Picos arrived = receiver.h2d.reserve(left, duration, host_time_);
  sender.counters.d2h_busy += duration;
  receiver.counters.h2d_busy += duration;
  source.time = left + duration;
  target.time = arrived + duration;
  sender.counters.peer_bytes += int64_t(nbytes);
  note("peer copy", target.device, "h2d", arrived, duration, int64_t(nbytes));
  source.clock.join(target.clock);  // torch makes both current streams wait for each other around a peer copy
  target.clock.join(source.clock);
}

void World::defer_delivery(int timeline, const char* op, char* host, const void* bytes, size_t nbytes, Keep keep) {
  const char* from = static_cast<const char*>(bytes);
  transfers_.push_back({timeline, at(timeline).clock[timeline], at(timeline).time, op, host, nbytes, std::vector<char>(from, from + nbytes), 0, true, std::move(keep)});
}

void World::watch_source(int timeline, const char* op, const char* host, size_t nbytes, Keep keep) {
  transfers_.push_back({timeline, at(timeline).clock[timeline], at(timeline).time, op, const_cast<char*>(host), nbytes, {}, checksum(host, nbytes), false, std::move(keep)});
}

void World::deliver(Transfer& transfer, std::vector<Transfer>& also) {
  if (transfer.nbytes == 0) return;
  if (transfer.to_host) {
    std::memcpy(transfer.host, transfer.bytes.data(), transfer.nbytes);
    for (auto* list : {&transfers_, &also})  // these bytes are the device's own: no host has changed that copy's source
      for (Transfer& other : *list)
        if (!other.to_host && other.host < transfer.host + transfer.nbytes && transfer.host < other.host + other.nbytes) other.nbytes = 0;
  } else if (config_.races != "off" && checksum(transfer.host, transfer.nbytes) != transfer.checksum) {
    report("host-write", at(transfer.stream).device, 0, "host write", {transfer.stream, transfer.stamp, transfer.op}, transfer.nbytes);
  }
}

void World::reclaim_pinned() {
  std::vector<Transfer> waiting, done;
  for (Transfer& transfer : transfers_) {
    const bool ended = !transfer.to_host && transfer.end <= host_time_ && transfer.keep.unshared(transfer.keep.memory.get());
    (ended ? done : waiting).push_back(std::move(transfer));
  }
  transfers_.swap(waiting);
  for (Transfer& transfer : done) {
    deliver(transfer, done);
    garbage_.push_back(std::move(transfer.keep.memory));
  }
}

void World::deliver_overlapping(int timeline, const char* host, size_t nbytes) {
  const Stream& stream = at(timeline);
  for (Transfer& transfer : transfers_)
    if (transfer.to_host && transfer.host < host + nbytes && host < transfer.host + transfer.nbytes &&
        (transfer.stream == timeline || ordered({transfer.stream, transfer.stamp, ""}, stream))) {
      deliver(transfer, transfers_);
      transfer.nbytes = 0;
    }
}

void World::settle() {
  std::vector<Transfer> waiting, done;
  for (Transfer& transfer : transfers_) (host_clock_[transfer.stream] >= transfer.stamp ? done : waiting).push_back(std::move(transfer));
  transfers_.swap(waiting);
  for (Transfer& transfer : done) {
    deliver(transfer, done);
    garbage_.push_back(std::move(transfer.keep.memory));
  }
}

}  // namespace greenroom
