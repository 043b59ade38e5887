#pragma once

#include <map>
#include <string>

namespace greenroom {

void set_flops(const std::map<std::string, double>& by_dtype);  // FLOP/s by torch dtype name
void forget_shapes();  // what dry mode remembers depends on its limit
void register_operators();

}  // namespace greenroom
