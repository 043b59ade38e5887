#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>

#include <cstring>

namespace greenroom {

using c10::DataPtr;
using c10::Device;
using c10::DeviceIndex;

// ---- which device, which stream (per thread, as in CUDA) ----------------------------------------------------------------

namespace {
thread_local int tls_device = 0;
thread_local std::vector<int> tls_streams;  // by device: stream index

int checked(int device) {
  const int count = World::get().config().devices;
  if (device < 0) return tls_device < count ? tls_device : 0;
  TORCH_CHECK(device < count, "sim:", device, " does not exist: the simulator is configured with ", count,
              " device(s). Ask for more with greenroom.sim.configure(..., devices=", device + 1, ").");
  return device;
}

int stream_index(int device) {
  return size_t(device) < tls_streams.size() ? tls_streams[device] : 0;
}

c10::Stream as_stream(int device, int index) {
  return c10::Stream(c10::Stream::UNSAFE, Device(kSim, DeviceIndex(device)), index);
}
}  // namespace

int current_device() {
  return checked(-1);
}

int known_device(int device) {
  return checked(device);
}

int current_timeline(int device) {
  const World::Lock lock;
  return World::get().stream_of(device, stream_index(device));
}

int timeline_of(const c10::Stream& stream) {
  return World::get().stream_of(checked(stream.device_index()), int(stream.id()));
}

// ---- device memory ------------------------------------------------------------------------------------------------------

namespace {
constexpr int kPoison = 0xFF;  // all bits set is NaN in every floating dtype, -1 in signed integers, True in bool

struct Poisoned {  // real memory of a block; poisoned when the block is freed
  Poisoned(DataPtr data, size_t n) : memory(std::move(data)), nbytes(n) {}
  DataPtr memory;
  size_t nbytes;
  ~Poisoned() {
    if (memory) std::memset(memory.get(), kPoison, nbytes);
  }
};

void free_block(void* block) {
  World::get().release(static_cast<Block*>(block));
}

void attach_dry_memory(Block& block) {
  const size_t nbytes = block.nbytes;
  void* at = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(at != MAP_FAILED, "greenroom.sim: no address space for a dry tensor of ", nbytes, " bytes");
  block.ptr = static_cast<char*>(at);
  block.owner = std::shared_ptr<void>(at, [nbytes](void* p) { ::munmap(p, nbytes); });
}
}  // namespace

DataPtr make_block(int device, size_t nbytes, DataPtr memory, bool zero) {
  const Device where(kSim, DeviceIndex(device));
  if (nbytes == 0) return {nullptr, where};
  Block* block = nullptr;
  {
    const World::Lock lock;
    try {
      block = World::get().allocate(device, current_timeline(device), nbytes);
    } catch (const OutOfMemory& error) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
    }
  }
  DataPtr result(nullptr, block, &free_block, where);  // owns the block from here on, whatever is thrown below
  if (!memory && block->dry) {
    attach_dry_memory(*block);
  } else {
    if (!memory) {
      memory = c10::GetCPUAllocator()->allocate(nbytes);
      std::memset(memory.get(), zero ? 0 : kPoison, nbytes);
    }
    block->ptr = static_cast<char*>(memory.get());
    block->owner = std::make_shared<Poisoned>(std::move(memory), block->dry ? 0 : nbytes);
  }
  {
    const World::Lock lock;
    World::get().index(block);
  }
  result.release_context();
  return {block->ptr, block, &free_block, where};
}

Block* block_of(const DataPtr& data) {
  if (data.get_deleter() == &free_block) return static_cast<Block*>(data.get_context());
  if (data.get() == nullptr) return nullptr;
  const World::Lock lock;  // a storage that torch made over a block's memory, as pickling does
  Block* block = World::get().find(data.get());
  TORCH_CHECK(block != nullptr, "greenroom.sim: this tensor's memory was not allocated on the simulated device");
  return block;
}

Block* block_of(const c10::Storage& storage) {
  return block_of(storage.data_ptr());
}

namespace {
struct SimAllocator final : c10::DeviceAllocator {
  DataPtr allocate(size_t nbytes) override { return make_block(current_device(), nbytes); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dest, const void* src, size_t count) const override { default_copy_data(dest, src, count); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    const World::Lock lock;
    for (int d = 0; d < World::get().config().devices; ++d) World::get().empty_cache(d);
  }
  void recordStream(const DataPtr& data, c10::Stream stream) override {
    const World::Lock lock;
    if (Block* block = block_of(data)) World::get().record_stream(block, timeline_of(stream));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    const World::Lock lock;
    const Memory& memory = World::get().memory(checked(device));
    c10::CachingDeviceAllocator::DeviceStats stats;
    const auto fill = [](auto& array, const Gauge& gauge) {
      array[0].current = gauge.current;
      array[0].peak = gauge.peak;
      array[0].allocated = gauge.total;
      array[0].freed = gauge.freed;
    };
    fill(stats.allocated_bytes, memory.allocated);
    fill(stats.active_bytes, memory.active);
    fill(stats.reserved_bytes, memory.reserved);
    fill(stats.requested_bytes, memory.requested);
    stats.num_alloc_retries = memory.flushes;
    stats.num_ooms = memory.ooms;
    stats.num_device_alloc = memory.allocs;
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex device) override {
    const World::Lock lock;
    Memory& memory = World::get().memory(checked(device));
    memory.flushes = memory.ooms = memory.allocs = 0;
    for (Gauge* gauge : {&memory.allocated, &memory.active, &memory.reserved, &memory.requested}) gauge->forget_total();
  }
  void resetPeakStats(DeviceIndex device) override {
    const World::Lock lock;
    Memory& memory = World::get().memory(checked(device));
    for (Gauge* gauge : {&memory.allocated, &memory.active, &memory.reserved, &memory.requested}) gauge->forget_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    const World::Lock lock;
    const int64_t capacity = World::get().config().capacity;
    return {size_t(std::max<int64_t>(0, capacity - World::get().memory(checked(device)).reserved.current)), size_t(capacity)};
  }
};

SimAllocator sim_allocator;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &sim_allocator);

// ---- pinned host memory -------------------------------------------------------------------------------------------------

void free_pinned(void* block) {
  World::get().unpin(static_cast<Block*>(block), false);
}

struct PinnedAllocator final : at::HostAllocator {
  DataPtr allocate(size_t nbytes) override {
    if (nbytes == 0) return {nullptr, c10::kCPU};
    {
      const World::Lock lock;
      World::get().reclaim_pinned();
    }
    const World::Lock lock;
    Block* block = World::get().pin(nbytes, false);
    DataPtr result(nullptr, block, &free_pinned, c10::kCPU);
    auto memory = std::make_shared<DataPtr>(c10::GetCPUAllocator()->allocate(nbytes));
    block->ptr = static_cast<char*>(memory->get());
    block->owner = std::move(memory);
    World::get().index_pinned(block);
    result.release_context();
    return {block->ptr, block, &free_pinned, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dest, const void* src, size_t count) const override { default_copy_data(dest, src, count); }
  bool record_event(void*, void*, c10::Stream) override { return true; }  // a copy in flight keeps its host memory by itself
  void empty_cache() override {
    const World::Lock lock;
    World::get().empty_pinned_cache();
  }
  at::HostStats get_stats() override {
    const World::Lock lock;
    at::HostStats stats;
    const Gauge& pinned = World::get().pinned;
    stats.allocated_bytes.current = pinned.current;
    stats.allocated_bytes.peak = pinned.peak;
    stats.allocated_bytes.allocated = pinned.total;
    stats.active_bytes.current = pinned.current - World::get().pinned_cached();
    return stats;
  }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {
    const World::Lock lock;
    World::get().pinned.forget_peak();
  }
};

PinnedAllocator sim_pinned_allocator;
REGISTER_HOST_ALLOCATOR(at::kPrivateUse1, &sim_pinned_allocator)

// ---- random numbers: a CPU generator under the device's name ------------------------------------------------------------

struct SimGenerator final : c10::GeneratorImpl {
  explicit SimGenerator(DeviceIndex device, at::Generator cpu = at::detail::createCPUGenerator(c10::default_rng_seed_val))
      : GeneratorImpl(Device(kSim, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), inner(std::move(cpu)) {}
  static c10::DeviceType device_type() { return kSim; }
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override {}  // the CPU's generator has none; copying a generator asks for it
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  SimGenerator* clone_impl() const override { return new SimGenerator(device().index(), inner.clone()); }

  at::Generator inner;
};

at::Generator make_sim_generator(DeviceIndex device) {
  return at::make_generator<SimGenerator>(DeviceIndex(checked(device)));
}
}  // namespace

c10::Storage make_storage(int device, size_t nbytes, DataPtr memory, bool zero) {
  return c10::Storage(c10::Storage::use_byte_size_t(), nbytes, make_block(device, nbytes, std::move(memory), zero),
                      &sim_allocator, true);
}

at::Generator cpu_generator(const at::Generator& generator) {
  return static_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

namespace {
const at::Generator& default_generator_ref(int device) {
  static std::mutex mutex;
  static auto* generators = new std::map<int, at::Generator>;
  std::lock_guard<std::mutex> lock(mutex);
  auto it = generators->find(device);
  if (it == generators->end()) it = generators->emplace(device, make_sim_generator(DeviceIndex(device))).first;
  return it->second;
}
}  // namespace

at::Generator default_generator(int device) {
  return default_generator_ref(device);
}

// ---- what torch's generic device code calls -----------------------------------------------------------------------------

namespace {
struct SimGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return Device(kSim, DeviceIndex(current_device())); }
  void setDevice(Device device) const override { tls_device = checked(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) tls_device = device.index();
  }
  c10::Stream getStream(Device device) const override {
    const int index = checked(device.index());
    return as_stream(index, stream_index(index));
  }
  c10::Stream getDefaultStream(Device device) const override { return as_stream(checked(device.index()), 0); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(Device device, int) const override {
    const World::Lock lock;
    const int index = checked(device.index());
    return as_stream(index, World::get().stream(World::get().new_stream(index)).index);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const int device = checked(stream.device_index());
    const c10::Stream before = as_stream(device, stream_index(device));
    if (tls_streams.size() <= size_t(device)) tls_streams.resize(device + 1);
    tls_streams[device] = int(stream.id());
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(World::get().config().devices); }
  c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }

  void record(void** event, const c10::Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    const World::Lock lock;
    if (*event == nullptr) *event = new Event;
    World::get().record(*static_cast<Event*>(*event), timeline_of(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    const World::Lock lock;
    if (event != nullptr) World::get().wait(*static_cast<Event*>(event), timeline_of(stream));
  }
  bool queryEvent(void* event) const override {
    const World::Lock lock;
    return event == nullptr || World::get().query(*static_cast<Event*>(event));
  }
  void synchronizeEvent(void* event) const override {
    const World::Lock lock;
    if (event != nullptr) World::get().sync_event(*static_cast<Event*>(event));
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* begin, void* end, const DeviceIndex) const override {
    TORCH_CHECK(begin != nullptr && end != nullptr, "Both events must be recorded before their time is compared.");
    return double(static_cast<Event*>(end)->time - static_cast<Event*>(begin)->time) * 1e-9;  // milliseconds
  }
  bool queryStream(const c10::Stream& stream) const override {
    const World::Lock lock;
    return World::get().query_stream(timeline_of(stream));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    const World::Lock lock;
    World::get().sync_stream(timeline_of(stream));
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    const World::Lock lock;
    World::get().sync_device(checked(device));
  }
  void recordDataPtrOnStream(const DataPtr& data, const c10::Stream& stream) const override {
    sim_allocator.recordStream(data, stream);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, SimGuard)

struct SimHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DeviceIndex(World::get().config().devices); }
  void setCurrentDevice(DeviceIndex device) const override { tls_device = checked(device); }
  DeviceIndex getCurrentDevice() const override { return DeviceIndex(current_device()); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    const auto before = DeviceIndex(current_device());
    tls_device = checked(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator_ref(checked(device)); }
  at::Generator getNewGenerator(DeviceIndex device) const override { return make_sim_generator(device); }
  Device getDeviceFromPtr(void*) const override { return Device(kSim, DeviceIndex(current_device())); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &sim_pinned_allocator; }
  bool isPinnedPtr(const void* data) const override {
    const World::Lock lock;
    return World::get().find_pinned(data) != nullptr;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    Block* old = block_of(storage);
    DataPtr fresh = make_block(storage.device().index(), nbytes);
    Block* block = block_of(fresh);
    if (old != nullptr && block != nullptr && !old->dry && !block->dry)
      std::memcpy(block->ptr, old->ptr, std::min(old->nbytes, nbytes));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(nbytes);
  }
};

const bool hooks_registered = [] {
  at::RegisterPrivateUse1HooksInterface(new SimHooks);
  return true;
}();
}  // namespace

}  // namespace greenroom
