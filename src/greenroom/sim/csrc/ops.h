// What the files about operators share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <map>
#include <string>
#include <vector>

#include "device.h"

namespace greenroom {

// call.cpp: any operator, by the CPU's kernel.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack);
void forget_shapes();  // what dry mode remembers depends on its limit

// True while this thread runs a CPU kernel for a simulated operator: what it does inside is that operator's affair, not the host's.
bool inside_kernel();

// copy.cpp
at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool non_blocking);
at::Tensor& host_copy_(at::Tensor& self, const at::Tensor& from, bool non_blocking);

// cost.cpp: what an operator costs. Sizes are those of its tensor arguments or results, in order.
using Sizes = std::vector<std::vector<int64_t>>;
void set_flops(const std::map<std::string, double>& by_dtype);  // FLOP/s by torch dtype name
double flops_rate(at::ScalarType dtype);                        // 0 if the profile has none
double flops_of(const std::string& op, const Sizes& in, const Sizes& out, const torch::jit::Stack& arguments);
bool reads_rows(const std::string& op);
bool only_writes(const std::string& op);
bool host_reads_result(const std::string& op);
int64_t unique_bytes(const at::Tensor& t);

// ops.cpp
void register_operators();

// The bytes that a tensor spans, from its first to its last element.
inline Span span_of(const at::Tensor& t, Block* block, bool write) {
  int64_t last = 1;
  for (int64_t d = 0; d < t.dim(); ++d) last += t.stride(d) * (t.size(d) - 1);
  const size_t item = t.element_size(), begin = size_t(t.storage_offset()) * item;
  return {block, begin, begin + (t.numel() == 0 ? 0 : size_t(last) * item), write};
}

inline bool is_sim(const at::Tensor& t) {
  return t.defined() && t.device().type() == kSim;
}

}  // namespace greenroom
