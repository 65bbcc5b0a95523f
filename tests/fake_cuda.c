/* A libcuda that writes down what it is asked to launch and does nothing: so Triton's own launcher runs without a GPU.

   All handles are made up. A launch is a line appended to $FAKE_CUDA_LOG: grid, threads of a block, bytes of shared
   memory, stream, function | attributes | the 8 bytes behind each of the first $FAKE_CUDA_PARAMETERS parameters. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "fake"; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute name, int value) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static size_t count = 0;
  *function = (CUfunction)++count;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction function) {
  *value = name == CU_FUNC_ATTRIBUTE_NUM_REGS ? 40 : name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) {
  *value = name == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : 232448;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute name, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  FILE *log = fopen(getenv("FAKE_CUDA_LOG"), "a");
  int count = atoi(getenv("FAKE_CUDA_PARAMETERS"));
  fprintf(log, "%u %u %u %u %u %zu", config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
          config->sharedMemBytes, (size_t)config->hStream);
  fprintf(log, " %zu |", (size_t)function);
  for (unsigned i = 0; i < config->numAttrs; i++)
    fprintf(log, " %d:%d", config->attrs[i].id, config->attrs[i].value.cooperative);
  fprintf(log, " |");
  for (int i = 0; i < count; i++)
    fprintf(log, " %llx", *(unsigned long long *)parameters[i]);
  fprintf(log, "\n");
  fclose(log);
  return CUDA_SUCCESS;
}
