// What a core can do at most: multiply-adds on numbers that never leave its registers. No result is wanted, only the
// time that it takes: it is the denominator of the products' speed.
#pragma once

#include <cstdint>

#include "float_type.h"

namespace psykern {

struct Peak {
  FloatType type;      // of the numbers that are multiplied; sums are fp32
  int64_t num_blocks;  // of work, handed out to the threads; each takes tens of microseconds
};

}  // namespace psykern
