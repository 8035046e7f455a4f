// How an array's numbers are stored. bf16 is the upper half of fp32; fp16 are weights of some files. Sums are fp32.
#pragma once

namespace psykern {

enum class FloatType { kFloat32, kBfloat16, kFloat16 };

}  // namespace psykern
