// A pool of threads that starts with the first parallel call and lives as long as the process.
#pragma once

#include <cstddef>
#include <functional>

namespace honeytrace {

// Calls body(item) for every item in [0, items), on at most `threads` threads, this one included; returns when all
// are done. Items are handed out one by one, so a body must not depend on which thread runs it. The first exception
// of a body stops the handing out and is thrown here. While another call holds the pool, and in a body, the items
// run on the calling thread alone: callers never wait for one another.
void parallel_for(size_t items, size_t threads, const std::function<void(size_t)>& body);

// Workers started so far in this process.
size_t pool_workers();

}  // namespace honeytrace
