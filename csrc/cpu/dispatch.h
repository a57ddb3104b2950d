// Which instruction sets this build holds, which of them this machine runs, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace honeytrace {

// Levels compiled into this build, weakest first.
std::vector<std::string> compiled_levels();

// Those that this machine can run as well, weakest first.
std::vector<std::string> usable_levels();

// The kernels in use. The first call reads HONEYTRACE_SIMD (the strongest usable level where it is unset or empty);
// a level that cannot run throws std::invalid_argument with the names of those that can.
const Kernels& kernels();

// Makes `name` the level in use; throws std::invalid_argument as above.
void set_level(const std::string& name);

}  // namespace honeytrace
