// How an array's numbers are stored. bf16 is the upper half of fp32; sums are fp32 always.
#pragma once

namespace psykern {

enum class FloatType { kFloat32, kBfloat16 };

}  // namespace psykern
