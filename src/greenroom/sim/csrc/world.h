// The simulated machine: memory, streams, engines, the virtual clock and the race detector.
//
// This file knows nothing of torch. A program's effects arrive as calls (a kernel was issued, a copy was issued, the host
// waited, a block was freed); the world keeps account of what each would have cost and whether it was ordered.
//
// Time is an integer number of picoseconds, so the same program gives the same time on every machine. Work is *executed* by the
// caller, at once and in program order; only its time and its ordering are simulated. That is why an ordering mistake never
// shows in the results here, and why the race detector exists.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace greenroom {

using Picos = int64_t;
Picos to_picos(double seconds);

struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a machine is made of. Rates are bytes per second, durations seconds.
struct Config {
  int devices = 1;
  int64_t capacity = int64_t(24) << 30;
  int64_t pinned_capacity = -1;  // -1: no limit
  int64_t dry_above = -1;        // storages larger than this are never touched; -1: everything is real
  double memory_bytes_per_s = 1e12, launch_s = 0, kernel_s = 0;
  double h2d_pinned = 1e10, d2h_pinned = 1e10, h2d_pageable = 1e10, d2h_pageable = 1e10, copy_latency_s = 0;
  double pin_bytes_per_s = 1e10, register_bytes_per_s = 1e10, pin_s = 0, host_copy_bytes_per_s = 1e10;
  double inline_copy_bytes = 0;
  std::string races = "report";  // "report", "raise" or "off"
  bool trace = false;
};

// A vector clock: entry i is the last operation of timeline i that is known to have finished before.
// Timeline 0 is the host; each stream has one of its own.
class Clock {
 public:
  uint64_t operator[](size_t i) const { return i < at_.size() ? at_[i] : 0; }
  void set(size_t i, uint64_t v);
  void join(const Clock& other);

 private:
  std::vector<uint64_t> at_;
};

const char* interned(const std::string& name);  // lives for ever, as a schema need not

struct Access {  // one operation's touch of some bytes
  int stream = 0;      // timeline index; 0 means nobody
  uint64_t stamp = 0;  // that timeline's count when it happened
  const char* op = "";
};

struct Segment {  // bytes [begin, end) of a block that share a history
  size_t begin, end;
  Access write;
  std::vector<Access> reads;  // since `write`, the last of each stream
};

struct Block {  // one allocation: device memory, or pinned host memory (device == -1)
  int device = 0;
  int stream = 0;  // timeline that owns the memory: freeing returns it there
  char* ptr = nullptr;
  size_t nbytes = 0, charged = 0;
  bool dry = false;
  std::shared_ptr<void> owner;  // the real memory
  std::set<int> recorded;       // record_stream: streams that the allocator must wait for
  std::vector<Segment> history;
};

struct Span {  // an operand: bytes of a block that an operation reads or writes
  Block* block;
  size_t begin, end;
  bool write;
};

// Host memory that a copy in flight keeps alive, and whether nobody else does any more.
struct Keep {
  std::shared_ptr<void> memory;
  bool (*unshared)(const void* memory);
};

struct Event {
  Picos time = 0;
  Clock clock;
  int stream = 0;
  uint64_t epoch = 0;  // resets of the world before it was recorded
};

struct Race {
  std::string kind, op, other_op;
  int device, stream, other_stream;
  size_t nbytes;
};

struct TraceRow {
  std::string name;
  int device;
  std::string lane;
  Picos start, duration;
  int64_t value;  // bytes moved, or bytes in use for lane "memory"
};

struct Counters {
  int64_t kernels = 0, syncs = 0;
  int64_t h2d_bytes = 0, d2h_bytes = 0, h2d_copies = 0, d2h_copies = 0, peer_bytes = 0;
  Picos compute_busy = 0, h2d_busy = 0, d2h_busy = 0;
};

struct Gauge {
  int64_t current = 0, peak = 0, total = 0, freed = 0;
  void add(int64_t n);
  void sub(int64_t n) { current -= n, freed += n; }
  void forget_peak() { peak = current; }
  void forget_total() { total = freed = 0; }
};

// Device memory as torch's caching allocator presents it, without fragmentation: freed bytes stay cached for the stream that
// allocated them; any request that the cache of its stream can fill takes no new memory from the device.
struct Memory {
  Gauge allocated, active, reserved, requested;  // active: allocated, or freed but held for a recorded stream
  std::map<int, int64_t> cached;                 // by stream
  int64_t allocs = 0, ooms = 0, flushes = 0;
};

// A resource that serves one job at a time: the first gap that is long enough, at or after `ready`.
class Engine {
 public:
  Picos reserve(Picos ready, Picos duration, Picos now);
  void clear() { busy_.clear(); }

 private:
  std::map<Picos, Picos> busy_;  // start -> end, disjoint
};

struct Stream {
  int device, index;  // index within the device; 0 is the default stream
  Picos time = 0;     // when the work issued so far ends
  Clock clock;
  uint64_t host_seen = 0;  // which version of the host's clock has been joined
};

enum class Link { h2d, d2h };

class World {
 public:
  static World& get();

  // Holds the world still. What was kept alive for a finished copy is let go only after the lock: freeing it may run foreign
  // code (Python's, even) that waits for something another thread holds while it waits for us.
  class Lock {
   public:
    Lock();
    ~Lock();

   private:
    World& world_;
  };

  void configure(const Config& config);
  void reset();
  const Config& config() const { return config_; }
  Picos now() const { return host_time_; }
  uint64_t epoch() const { return epoch_; }
  bool is_dry(size_t nbytes) const { return config_.dry_above >= 0 && int64_t(nbytes) > config_.dry_above; }

  // Memory. `allocate` charges the bytes; the caller then attaches the real memory as `owner`.
  Block* allocate(int device, int stream, size_t nbytes);
  void release(Block* block) noexcept;
  // Throws what an operator's allocations would throw, before it has done anything.
  void foresee(int device, int stream, const std::vector<int64_t>& sizes);
  bool has_to_foresee(int device) const;
  void index(Block* block);               // once its ptr is known
  Block* find(const void* ptr);           // the device memory that a foreign pointer leads to
  void record_stream(Block* block, int stream);
  void empty_cache(int device);
  Memory& memory(int device) { return devices_.at(device).memory; }

  Block* pin(size_t nbytes, bool in_place);  // allocator-pinned memory is rounded up to a power of two, as torch does
  void index_pinned(Block* block);           // once its ptr is known
  void unpin(Block* block, bool in_place) noexcept;
  void reclaim_pinned();  // lets go of sources whose copies have ended by now, as torch's allocator does at each request
  Block* find_pinned(const void* ptr);
  bool any_pinned(const char* begin, size_t nbytes) const;
  void empty_pinned_cache();
  Gauge pinned;
  int64_t pinned_cached() const;

  // Streams and events, by timeline index.
  int stream_of(int device, int index);
  int new_stream(int device);
  const Stream& stream(int timeline) const { return *streams_.at(timeline); }
  void record(Event& event, int stream);
  void wait(const Event& event, int stream);
  bool query(const Event& event);
  bool query_stream(int stream);
  void sync_event(const Event& event);
  void sync_stream(int stream);
  void sync_device(int device);
  void settle_device(int device);  // the same, for measuring: counts as no wait of the program's

  void check_fault(const std::string& kind);  // throws if this is the one that was asked to fail

  // Work. `begin` may throw (fault, race) and then nothing has happened; `finish_*` gives the operation its time.
  void begin(int stream, const char* op, const std::vector<Span>& spans);
  void finish_kernel(int stream, const char* op, Picos duration, const std::vector<Span>& fresh);
  Picos finish_copy(int stream, Link link, const char* op, size_t nbytes, bool pinned, bool blocking);
  void host_copy(size_t nbytes);  // within host memory
  void finish_peer_copy(int from_stream, int to_stream, size_t nbytes);
  // A pinned copy in flight: device-to-host bytes are delivered, and a host-to-device source is looked at again, once the host
  // has waited for the copy. `keep` holds the host memory alive until then.
  void defer_delivery(int stream, const char* op, char* host, const void* bytes, size_t nbytes, Keep keep);
  void watch_source(int stream, const char* op, const char* host, size_t nbytes, Keep keep);
  void deliver_overlapping(int stream, const char* host, size_t nbytes);  // before a copy reads what an earlier one wrote

  void fail(const std::string& kind, int64_t nth);
  void slow_link(int device, const std::string& direction, double factor);
  Counters& counters(int device) { return devices_.at(device).counters; }
  std::vector<Race> races;
  std::vector<TraceRow> trace;

 private:
  struct Device {
    Memory memory;
    Counters counters;
    Engine compute, h2d, d2h;
    double h2d_slow = 1, d2h_slow = 1;
    std::vector<int> streams;
    std::deque<std::pair<Block*, Picos>> held;  // freed, waiting for a recorded stream
  };
  struct Transfer {
    int stream;
    uint64_t stamp;
    Picos end;
    const char* op;
    char* host;
    size_t nbytes;
    std::vector<char> bytes;  // device to host: what will arrive
    uint64_t checksum;        // host to device: what was there
    bool to_host;
    Keep keep;
  };

  World();
  void catch_up(Stream& stream);  // what the host knows, its next operation knows
  Stream& at(int timeline) { return *streams_.at(timeline); }
  bool ordered(const Access& access, const Stream& stream) const;
  void check(const Stream& stream, int timeline, const Span& span, const char* op);
  void touch(const Stream& stream, int timeline, const Span& span, const char* op);
  void report(const char* kind, int device, int stream, const char* op, const Access& other, size_t nbytes);
  void raise_if_asked();
  void host_waits_until(Picos time, const Clock& clock);
  void settle();
  void deliver(Transfer& transfer, std::vector<Transfer>& also);
  void drop_held(int device, bool wait);
  void give_back(Block* block) noexcept;
  void note(const std::string& name, int device, const char* lane, Picos start, Picos duration, int64_t value);

  Config config_;
  std::vector<Device> devices_;
  std::vector<std::unique_ptr<Stream>> streams_;  // 0 is the host's place
  Clock host_clock_;
  uint64_t host_version_ = 1, epoch_ = 0;
  Picos host_time_ = 0;
  std::vector<Transfer> transfers_;
  std::map<const char*, Block*> index_, pinned_index_;
  std::map<int64_t, int64_t> pinned_free_;  // rounded size -> cached blocks
  std::map<std::string, int64_t> faults_;
  std::string pending_error_;
  std::vector<std::shared_ptr<void>> garbage_;
  std::recursive_mutex mutex_;
  int depth_ = 0;
};

}  // namespace greenroom
