"""The operations as Triton kernels, for fp32, bf16 and fp16 on a GPU, and on a CPU under ``TRITON_INTERPRET=1``.
Products with a weight are the vendor's, those with the weights of many experts are here.

All arithmetic is fp32; matrix products take 16-bit inputs as they are and fp32 ones without rounding them to tf32.
Nothing is tuned at run time: sizes of tiles come from tables by dtype and shape, partial results are combined in a
fixed order, and no launch waits for the device. Rows of inputs and outputs may lie apart, as in a slice of a
projection; the numbers of a row must be dense. Arguments are checked by ``psykern.kernels``, where the operations are
described.
"""

from psykern.kernels.reference import linear, swiglu
from psykern.kernels.triton.elementwise import add_rms_norm, add_weighted, gather_rows, qk_norm_rope, silu_mul
from psykern.kernels.triton.experts import expert_linear, expert_swiglu
from psykern.kernels.triton.option_logprobs import option_logprobs
from psykern.kernels.triton.prefix_attention import prefix_attention

__all__ = [
    "add_rms_norm",
    "add_weighted",
    "expert_linear",
    "expert_swiglu",
    "gather_rows",
    "linear",
    "option_logprobs",
    "prefix_attention",
    "qk_norm_rope",
    "silu_mul",
    "swiglu",
]
