// A CUDA driver that runs nothing: of a launch it checks the grid, the block and the shared memory, and of a tensor map
// what TMA demands, by the limits of an H100. Triton compiles, loads and launches as on that machine.
#include <cuda.h>
#include <stdio.h>
#include <string.h>

enum { kSharedBytes = 232448, kThreads = 1024, kGridYZ = 65535, kBoxSide = 256 };

CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) { return *text = "refused by the stub", CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int i) { return *device = i, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return *function = (CUfunction)strdup(name), CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* config) {
  return *count = 1, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr*)data = pointer, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = kSharedBytes; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = kSharedBytes + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    default: *value = 32;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? kThreads : 0, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* launch, CUfunction function, void** arguments, void** extra) {
  const int fits = launch->gridDimX > 0 && launch->gridDimX <= 2147483647u && launch->gridDimY > 0 &&
                   launch->gridDimY <= kGridYZ && launch->gridDimZ > 0 && launch->gridDimZ <= kGridYZ &&
                   launch->blockDimX <= kThreads && launch->sharedMemBytes <= kSharedBytes;
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  dprintf(1, "launch %s\n", (const char*)function);
  return CUDA_SUCCESS;
}

// By the driver's documentation of cuTensorMapEncodeTiled.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const cuuint64_t item = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? 2 : 0;
  const cuuint64_t widest[] = {1 << 20, 32, 64, 128};  // bytes of a row of a box, by swizzle
  int fits = item != 0 && (cuuint64_t)address % 16 == 0 && swizzle <= CU_TENSOR_MAP_SWIZZLE_128B;
  for (cuuint32_t i = 0; fits && i < rank; ++i) {
    fits = sizes[i] > 0 && sizes[i] <= 1ull << 32 && box[i] > 0 && box[i] <= kBoxSide && steps[i] == 1;
  }
  for (cuuint32_t i = 0; fits && i + 1 < rank; ++i) {
    fits = strides[i] % 16 == 0 && strides[i] < 1ull << 40 && strides[i] >= sizes[0] * item;
  }
  fits = fits && box[0] * item % 16 == 0 && box[0] * item <= widest[swizzle];
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  dprintf(1, "map %u x %u\n", box[rank - 1], box[0]);
  return CUDA_SUCCESS;
}
