/* A CUDA driver and runtime without a GPU, for tests of code that asks `torch.cuda`.

   Preloaded into a process, it answers in place of libcuda and libcudart 13: there are FAKE_GPUS
   GPUs called FAKE_GPU_NAME, of compute capability FAKE_GPU_CAPABILITY (such as 90), with
   FAKE_GPU_GIB of memory. Events hold times, streams do nothing. Memory and kernels remain those of
   the real runtime, which refuses them: tensors have to be fake ones. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct timespec *event_t;
typedef void *stream_t;

struct properties { /* the beginning of cudaDeviceProp */
  char name[256], uuid[16], luid[8];
  unsigned luid_mask;
  size_t total_memory, shared_memory_per_block;
  int registers_per_block, warp_size;
  size_t memory_pitch;
  int max_threads_per_block, max_threads[3], max_grid[3];
  size_t constant_memory;
  int major, minor;
  size_t texture_alignment, texture_pitch_alignment;
  int num_multiprocessors;
};

static int current_device;

static long number(const char *name, long otherwise) {
  const char *text = getenv(name);
  return text ? atol(text) : otherwise;
}

int cudaGetDeviceCount(int *count) {
  *count = (int)number("FAKE_GPUS", 1);
  return *count ? 0 : 100; /* cudaErrorNoDevice */
}
int cudaGetDevice(int *device) { return *device = current_device, 0; }
int cudaSetDevice(int device) { return current_device = device, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }

int cudaGetDeviceProperties(struct properties *gpu, int device) {
  const char *name = getenv("FAKE_GPU_NAME");
  long capability = number("FAKE_GPU_CAPABILITY", 90);
  strncpy(gpu->name, name ? name : "NVIDIA H200", sizeof gpu->name - 1);
  gpu->uuid[15] = (char)device;
  gpu->total_memory = (size_t)number("FAKE_GPU_GIB", 140) << 30;
  gpu->warp_size = 32;
  gpu->max_threads_per_block = 1024;
  gpu->major = (int)(capability / 10);
  gpu->minor = (int)(capability % 10);
  gpu->num_multiprocessors = 132;
  return 0;
}
int cudaMemGetInfo(size_t *unused, size_t *total) {
  return *unused = *total = (size_t)number("FAKE_GPU_GIB", 140) << 30, 0;
}

int cudaEventCreateWithFlags(event_t *event, unsigned flags) {
  return *event = calloc(1, sizeof **event), 0;
}
int cudaEventDestroy(event_t event) { return free(event), 0; }
int cudaEventRecord(event_t event, stream_t stream) { return clock_gettime(CLOCK_MONOTONIC, event); }
int cudaEventRecordWithFlags(event_t event, stream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
int cudaEventQuery(event_t event) { return 0; }
int cudaEventSynchronize(event_t event) { return 0; }
int cudaEventElapsedTime(float *ms, event_t start, event_t end) {
  *ms = (float)((end->tv_sec - start->tv_sec) * 1e3 + (end->tv_nsec - start->tv_nsec) / 1e6);
  return 0;
}

int cudaDeviceSynchronize(void) { return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }
int cudaStreamCreateWithPriority(stream_t *stream, unsigned flags, int priority) {
  return *stream = calloc(1, 1), 0;
}
int cudaStreamGetPriority(stream_t stream, int *priority) { return *priority = 0; }
int cudaStreamQuery(stream_t stream) { return 0; }
int cudaStreamSynchronize(stream_t stream) { return 0; }
int cudaStreamWaitEvent(stream_t stream, event_t event, unsigned flags) { return 0; }
int cudaStreamIsCapturing(stream_t stream, int *status) { return *status = 0; }

int cudaDeviceGetAttribute(int *value, int attribute, int device) { return *value = 0; }
int cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaStreamGetCaptureInfo(stream_t stream, int *status) { return *status = 0; }
int cudaMalloc(void **memory, size_t size) { return *memory = calloc(1, size), 0; }
int cudaFree(void *memory) { return free(memory), 0; }
int cudaHostAlloc(void **memory, size_t size, unsigned flags) { return cudaMalloc(memory, size); }
int cudaFreeHost(void *memory) { return cudaFree(memory); }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return memmove(to, from, size), 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, stream_t stream) {
  return cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *memory, int value, size_t size) { return memset(memory, value, size), 0; }
int cudaMemsetAsync(void *memory, int value, size_t size, stream_t stream) {
  return cudaMemset(memory, value, size);
}

static int do_nothing(void) { return 0; }
int cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags, int *status) {
  return *function = do_nothing, *status = 0;
}

/* torch asks libcuda whether a device has a context. It never calls the others, which its library
   needs to be loaded. */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, 0;
}
#define NEVER(name) int name(void) { abort(); }
NEVER(cuCtxGetCurrent) NEVER(cuCtxSetCurrent) NEVER(cuDeviceGet) NEVER(cuDeviceGetAttribute)
NEVER(cuDevicePrimaryCtxRetain) NEVER(cuFuncGetAttribute) NEVER(cuFuncSetAttribute)
NEVER(cuFuncSetCacheConfig) NEVER(cuGetErrorString) NEVER(cuLaunchCooperativeKernel)
NEVER(cuLaunchKernel) NEVER(cuLinkAddData_v2) NEVER(cuLinkComplete) NEVER(cuLinkCreate_v2)
NEVER(cuModuleGetFunction) NEVER(cuModuleLoad) NEVER(cuModuleLoadData) NEVER(cuModuleLoadDataEx)
NEVER(cuModuleUnload) NEVER(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NEVER(cuPointerGetAttribute) NEVER(cuTensorMapEncodeTiled)
