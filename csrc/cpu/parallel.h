// A loop over independent tasks on a pool of threads that is shared by all operations and grows on demand.
#pragma once

#include <cstdint>
#include <functional>

namespace psykern {

// Calls task(i) once for each i in [0, count) on at most `num_threads` threads, the caller's included, and returns when
// all are done. Tasks are handed out in order as threads become free, so a result must not depend on which thread
// computes it. The first exception that a task throws is thrown again here. One loop runs at a time.
void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace psykern
