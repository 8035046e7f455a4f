// A loop over independent tasks on the threads that torch uses too: those of the OpenMP runtime that is in the process.
// A pool of its own would share the cores with torch's threads, which wait for work spinning (measured: 1.3 times the
// time of an attention of 12 ms). Where there is no OpenMP runtime, a pool is made, which grows on demand.
#pragma once

#include <cstdint>
#include <functional>

namespace psykern {

// Calls task(i) once for each i in [0, count) on at most `num_threads` threads, the caller's included, and returns when
// all are done. Tasks are handed out in order as threads become free, so a result must not depend on which thread
// computes it. The first exception that a task throws is thrown again here.
void parallel_for(int64_t count, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace psykern
