// Under which name the headers of csrc/core are compiled here: honeytrace::device. Every file of csrc/cuda opens with
// it.
#pragma once

#define HONEYTRACE_LEVEL device
#define HONEYTRACE_PAIRED_POWER 1  // core/double_power.h

#include "core/hd.h"
