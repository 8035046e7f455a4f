// gather_rows; see ops.h. One block copies one row of bytes.
#include "common.cuh"

namespace psykern::cuda {
namespace {

template <int kSize>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const unsigned char* source, const int64_t* rows, unsigned char* out, int64_t row_bytes,
                       int64_t source_batch_bytes, int64_t out_batch_bytes) {
  const int64_t row = blockIdx.x;
  source += blockIdx.y * source_batch_bytes + rows[row] * row_bytes;
  out += blockIdx.y * out_batch_bytes + row * row_bytes;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kSize; i < row_bytes; i += kThreads * kSize) {
    store(out + i, load<kSize>(source + i));
  }
}

}  // namespace

void gather_rows(const void* source, const int64_t* rows, void* out, int64_t batches, int64_t count, int64_t row_bytes,
                 int64_t source_batch_bytes, int64_t out_batch_bytes, cudaStream_t stream) {
  if (batches == 0 || count == 0 || row_bytes == 0) return;
  const bool aligned =
      row_bytes % kPackBytes == 0 && is_aligned(source, source_batch_bytes) && is_aligned(out, out_batch_bytes);
  const auto kernel = aligned ? gather_rows_kernel<kPackBytes> : gather_rows_kernel<1>;
  kernel<<<dim3(static_cast<unsigned>(count), static_cast<unsigned>(batches)), kThreads, 0, stream>>>(
      static_cast<const unsigned char*>(source), rows, static_cast<unsigned char*>(out), row_bytes, source_batch_bytes,
      out_batch_bytes);
  check_launch("gather_rows", {batches, count, row_bytes});
}

}  // namespace psykern::cuda
