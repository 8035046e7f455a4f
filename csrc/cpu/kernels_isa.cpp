// One table of kernels for the instruction set that this file is compiled for: PSYKERN_TABLE is the table's name,
// PSYKERN_NAME the set's. See isa.h.
#include "elementwise_isa.h"
#include "isa.h"
#include "linear_isa.h"
#include "option_logprobs_isa.h"
#include "peak_isa.h"
#include "prefix_attention_isa.h"

namespace psykern {

extern const Kernels PSYKERN_TABLE = {
    PSYKERN_NAME,      kHasBf16Product, &option_logprobs_isa, &prefix_attention_isa, &add_rms_norm_isa,
    &qk_norm_rope_isa, &silu_mul_isa,   &add_weighted_isa,    &linear_isa,           &peak_isa,
};

}  // namespace psykern
