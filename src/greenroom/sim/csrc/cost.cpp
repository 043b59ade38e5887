// What an operator costs: floating-point operations by formula, bytes by its operands.
#include <algorithm>
#include <unordered_map>
#include <unordered_set>

#include "ops.h"

namespace greenroom {

using at::Tensor;
using torch::jit::Stack;

namespace {
std::unordered_map<int, double> flops_per_s;  // by ScalarType
}

double flops_rate(at::ScalarType dtype) {
  const auto it = flops_per_s.find(int(dtype));
  return it == flops_per_s.end() ? 0 : it->second;
}

void set_flops(const std::map<std::string, double>& by_dtype) {
  static const std::map<std::string, at::ScalarType> names = {
      {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16},
      {"float8_e4m3fn", at::kFloat8_e4m3fn}, {"float8_e5m2", at::kFloat8_e5m2}, {"int8", at::kChar}};
  flops_per_s.clear();
  for (const auto& entry : by_dtype) {
    auto it = names.find(entry.first);
    TORCH_CHECK(it != names.end(), "unknown dtype '", entry.first, "' among a profile's FLOP rates");
    flops_per_s[int(it->second)] = entry.second;
  }
}

namespace {

double product(const std::vector<int64_t>& sizes, size_t from = 0) {
  double p = 1;
  for (size_t i = from; i < sizes.size(); ++i) p *= double(sizes[i]);
  return p;
}

double matmul(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  return 2 * product(a) * double(b.size() > 1 ? b.back() : 1);
}

}  // namespace

// Multiply-adds count two. The formulas are those of torch.utils.flop_counter.
double flops_of(const std::string& op, const Sizes& in, const Sizes& out, const Stack& args) {
  if ((op == "aten::mm" || op == "aten::bmm" || op == "aten::mv" || op == "aten::dot" || op == "aten::_int_mm" ||
       op == "aten::_scaled_mm") && in.size() >= 2)
    return matmul(in[0], in[1]);
  if ((op == "aten::addmm" || op == "aten::baddbmm" || op == "aten::addbmm" || op == "aten::addmv" || op == "aten::addmm_" ||
       op == "aten::baddbmm_" || op == "aten::_addmm_activation") && in.size() >= 3)
    return matmul(in[1], in[2]);
  if (op == "aten::convolution" && in.size() >= 2 && !out.empty())  // weight: [out, in/groups, kernel...]; transposed: [in, out/groups, ...]
    return 2 * (args.size() > 6 && args[6].isBool() && args[6].toBool() ? product(in[0]) : product(out[0])) * product(in[1], 1);
  if (op == "aten::convolution_backward" && in.size() >= 3)
    return 2 * product(in[0]) * product(in[2], 1) *  // one product for each of the gradients of input and weight
           double(std::count_if(out.begin(), out.end(), [](const auto& sizes) { return sizes.size() > 1; }));
  if (op.rfind("aten::_scaled_dot_product", 0) == 0 && in.size() >= 3 && in[0].size() == 4) {
    const bool backward = op.find("backward") != std::string::npos;  // five products instead of two; argument 0 is the gradient
    if (backward && in.size() < 4) return 0;
    const auto &q = in[backward], &k = in[1 + backward], &v = in[2 + backward];
    return (backward ? 5.0 : 2.0) * double(q[0]) * double(q[1]) * double(q[2]) * double(k[2]) * double(q[3] + v[3]);
  }
  return 0;
}

// Operators that read a few rows of their first argument, as many bytes as they return.
bool reads_rows(const std::string& op) {
  static const std::unordered_set<std::string> ops = {"aten::index_select", "aten::embedding", "aten::gather", "aten::index", "aten::take"};
  return ops.count(op) > 0;
}

// In-place operators that only write: everything else in place also reads what it changes.
bool only_writes(const std::string& op) {
  static const std::unordered_set<std::string> ops = {"aten::fill_", "aten::zero_", "aten::copy_", "aten::normal_",
                                                      "aten::uniform_", "aten::random_", "aten::bernoulli_", "aten::exponential_"};
  return ops.count(op) > 0;
}

// Operators whose result the host needs: on a real device they wait for the stream.
bool host_reads_result(const std::string& op) {
  static const std::unordered_set<std::string> ops = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
                                                      "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
                                                      "aten::unique_dim_consecutive", "aten::bincount", "aten::repeat_interleave"};
  return ops.count(op) > 0;
}

int64_t unique_bytes(const Tensor& t) {
  int64_t n = t.element_size();
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.stride(d) != 0 || t.size(d) == 0) n *= t.size(d);
  return n;
}

}  // namespace greenroom
