// What torch asks of a device: an allocator, streams and events, pinned memory, random numbers.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <c10/core/Stream.h>

#include "world.h"

namespace greenroom {

constexpr auto kSim = c10::DeviceType::PrivateUse1;

int current_device();
int known_device(int device);  // refuses one that is not configured; a negative one is the current
int current_timeline(int device);  // of this thread's current stream on the device
int timeline_of(const c10::Stream& stream);

// The device memory behind a pointer of a simulated tensor; nullptr for empty storages.
Block* block_of(const c10::DataPtr& data);
Block* block_of(const c10::Storage& storage);

// Charges `nbytes` to the device; throws torch's OutOfMemoryError. Without `memory` it allocates: poisoned, or for a dry block
// address space that nobody touches. With `memory` it adopts what a CPU kernel has allocated.
c10::DataPtr make_block(int device, size_t nbytes, c10::DataPtr memory = {}, bool zero = false);
c10::Storage make_storage(int device, size_t nbytes, c10::DataPtr memory = {}, bool zero = false);

at::Generator cpu_generator(const at::Generator& generator);  // the CPU generator inside a simulated one
at::Generator default_generator(int device);

}  // namespace greenroom
