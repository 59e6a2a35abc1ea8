// A libcuda for tests: the functions that csrc/cuda/driver.cpp calls, on the emulated machine. What
// NVIDIA's driver refuses is refused, with its numbers.  Machine code does not run here:
// fake_resolve, a function of Python, says what compiled PTX stands for an image.  Streams end at
// once.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cuda/driver_api.h"
#include "emulation/machine.h"

using namespace attn::cuda::driver;

namespace {

enum : Result {
  INVALID_VALUE = 1,
  NOT_INITIALIZED = 3,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  OUT_OF_RESOURCES = 701,
  LAUNCH_FAILED = 719,
  CAPTURE_UNSUPPORTED = 900,
};

struct Context {
  int device;
};
struct Module {
  Context* context;
  std::string symbol;
  void (*body)(void*);
  int params_bytes, most_threads;
};
struct Function {
  Module* module;
  int smem_bytes = 48 * 1024;
};
// Of the driver: a stream belongs to a context.
struct Stream {
  Context* context;
  int capturing;
  int launches;
};

// What Python says of an image: the symbol of its kernel, what stands for it.
struct Resolved {
  char symbol[512];
  void (*body)(void*);
  int params_bytes, most_threads;
};
int (*resolve)(const void* image, Resolved* out) = nullptr;

struct Device {
  int capability = 80, multiprocessors = 6, shared_memory = 163 * 1024;
};
std::mutex guard;  // of all that follows
std::vector<Device> devices(1);
std::map<int, Context> contexts;
std::map<std::string, int> calls;
std::set<const void*> alive;  // contexts, functions, modules, streams
bool initialized = false;
Result broken = 0;  // an error that every later call gives back
int init_result = 0, driver_version = 13000;
thread_local std::vector<Context*> current;
thread_local int capture_mode = 0;  // global: what is unsafe while any stream captures is refused
std::set<Stream*> capturing;        // streams

Context* top() { return current.empty() ? nullptr : current.back(); }
template <class T>
T* known(Handle handle) {
  const std::lock_guard<std::mutex> lock(guard);
  return alive.count(handle) ? reinterpret_cast<T*>(handle) : nullptr;
}
// Counts a call; the error that it gives back before it does anything, or 0.
Result enter(const char* name, bool in_context) {
  const std::lock_guard<std::mutex> lock(guard);
  ++calls[name];
  if (!initialized) return NOT_INITIALIZED;
  if (!in_context) return 0;
  return top() ? broken : INVALID_CONTEXT;
}
// The context of the stream, whose default is the current one's.
Context* context_of(Handle stream) {
  return stream ? reinterpret_cast<Stream*>(stream)->context : top();
}

}  // namespace

#define FAKE extern "C" __attribute__((visibility("default"))) Result

FAKE cuInit(unsigned flags) {
  const std::lock_guard<std::mutex> lock(guard);
  ++calls["cuInit"];
  if (flags) return INVALID_VALUE;
  initialized = !init_result;
  return init_result;
}
FAKE cuDriverGetVersion(int* version) { return *version = driver_version, 0; }
FAKE cuGetErrorName(Result error, const char** text) {
  *text = error == LAUNCH_FAILED      ? "CUDA_ERROR_LAUNCH_FAILED"
          : error == INVALID_VALUE    ? "CUDA_ERROR_INVALID_VALUE"
          : error == INVALID_IMAGE    ? "CUDA_ERROR_INVALID_IMAGE"
          : error == INVALID_CONTEXT  ? "CUDA_ERROR_INVALID_CONTEXT"
          : error == ERROR_NO_DEVICE  ? "CUDA_ERROR_NO_DEVICE"
          : error == OUT_OF_RESOURCES ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"
                                      : "CUDA_ERROR_OF_THE_FAKE";
  return 0;
}
FAKE cuGetErrorString(Result, const char** text) { return *text = "in words", 0; }
FAKE cuDeviceGetCount(int* count) {
  const Result error = enter("cuDeviceGetCount", false);
  return error ? error : (*count = int(devices.size()), 0);
}
FAKE cuDeviceGet(DeviceId* device, int index) {
  if (const Result error = enter("cuDeviceGet", false)) return error;
  if (index < 0 || index >= int(devices.size())) return INVALID_DEVICE;
  return *device = index, 0;
}
FAKE cuDeviceGetAttribute(int* value, int attribute, DeviceId device) {
  if (const Result error = enter("cuDeviceGetAttribute", false)) return error;
  const Device& d = devices[device];
  switch (attribute) {
    case ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return *value = d.multiprocessors, 0;
    case ATTRIBUTE_CAPABILITY_MAJOR:
      return *value = d.capability / 10, 0;
    case ATTRIBUTE_CAPABILITY_MINOR:
      return *value = d.capability % 10, 0;
    case ATTRIBUTE_L2_CACHE_SIZE:
      return *value = 50 << 20, 0;
    case ATTRIBUTE_SHARED_MEMORY_OPTIN:
      return *value = d.shared_memory, 0;
  }
  return INVALID_VALUE;
}
FAKE cuDevicePrimaryCtxRetain(Handle* context, DeviceId device) {
  if (const Result error = enter("cuDevicePrimaryCtxRetain", false)) return error;
  const std::lock_guard<std::mutex> lock(guard);
  Context* found = &contexts.try_emplace(device, Context{device}).first->second;
  alive.insert(found);
  return *context = reinterpret_cast<Handle>(found), 0;
}
FAKE cuCtxGetCurrent(Handle* context) {
  const Result error = enter("cuCtxGetCurrent", false);
  return error ? error : (*context = reinterpret_cast<Handle>(top()), 0);
}
FAKE cuCtxPushCurrent_v2(Handle context) {
  if (const Result error = enter("cuCtxPushCurrent", false)) return error;
  if (!known<Context>(context)) return INVALID_CONTEXT;
  return current.push_back(reinterpret_cast<Context*>(context)), 0;
}
FAKE cuCtxPopCurrent_v2(Handle* context) {
  if (const Result error = enter("cuCtxPopCurrent", false)) return error;
  if (current.empty()) return INVALID_CONTEXT;
  *context = reinterpret_cast<Handle>(top());
  return current.pop_back(), 0;
}
FAKE cuStreamIsCapturing(Handle stream, int* status) {
  if (const Result error = enter("cuStreamIsCapturing", true)) return error;
  if (stream && !known<Stream>(stream)) return INVALID_HANDLE;
  return *status = stream ? reinterpret_cast<Stream*>(stream)->capturing : 0, 0;
}
FAKE cuThreadExchangeStreamCaptureMode(int* mode) {
  if (const Result error = enter("cuThreadExchangeStreamCaptureMode", false)) return error;
  if (*mode < 0 || *mode > CAPTURE_MODE_RELAXED) return INVALID_VALUE;
  return std::swap(*mode, capture_mode), 0;
}
FAKE cuModuleLoadData(Handle* module, const void* image) {
  if (const Result error = enter("cuModuleLoadData", true)) return error;
  if (capture_mode != CAPTURE_MODE_RELAXED) {
    const std::lock_guard<std::mutex> lock(guard);
    if (!capturing.empty()) return CAPTURE_UNSUPPORTED;
  }
  Resolved found = {};
  if (!resolve || !resolve(image, &found)) return INVALID_IMAGE;
  auto* made = new Module{top(), found.symbol, found.body, found.params_bytes, found.most_threads};
  const std::lock_guard<std::mutex> lock(guard);
  alive.insert(made);
  return *module = reinterpret_cast<Handle>(made), 0;
}
FAKE cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  if (const Result error = enter("cuModuleGetFunction", true)) return error;
  auto* in = known<Module>(module);
  if (!in) return INVALID_HANDLE;
  if (in->symbol != name) return NOT_FOUND;
  auto* made = new Function{in};
  const std::lock_guard<std::mutex> lock(guard);
  alive.insert(made);
  return *function = reinterpret_cast<Handle>(made), 0;
}
FAKE cuFuncSetAttribute(Handle function, int attribute, int value) {
  if (const Result error = enter("cuFuncSetAttribute", true)) return error;
  auto* of = known<Function>(function);
  if (!of) return INVALID_HANDLE;
  if (attribute != FUNCTION_DYNAMIC_SHARED_MEMORY || value < 0 ||
      value > devices[of->module->context->device].shared_memory)
    return INVALID_VALUE;
  return of->smem_bytes = value, 0;
}
FAKE cuMemsetD32Async(uintptr_t to, unsigned value, size_t count, Handle stream) {
  if (const Result error = enter("cuMemsetD32Async", true)) return error;
  if ((stream && !known<Stream>(stream)) || context_of(stream) != top()) return INVALID_HANDLE;
  if (!to || to % 4) return INVALID_VALUE;
  if (stream && reinterpret_cast<Stream*>(stream)->capturing)
    return ++reinterpret_cast<Stream*>(stream)->launches, 0;
  return std::fill_n(reinterpret_cast<unsigned*>(to), count, value), 0;
}
FAKE cuLaunchKernel(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                    unsigned block_x, unsigned block_y, unsigned block_z, unsigned smem_bytes,
                    Handle stream, void** params, void** extra) {
  if (const Result error = enter("cuLaunchKernel", true)) return error;
  auto* of = known<Function>(function);
  if (!of || (stream && !known<Stream>(stream))) return INVALID_HANDLE;
  const Module& module = *of->module;
  if (module.context != top() || context_of(stream) != top()) return INVALID_HANDLE;
  if (!grid_x || !grid_y || !grid_z || grid_x > 2147483647u || grid_y > 65535 || grid_z > 65535)
    return INVALID_VALUE;
  if (block_y != 1 || block_z != 1 || extra || int(smem_bytes) > of->smem_bytes)
    return INVALID_VALUE;
  if (!block_x || int(block_x) > module.most_threads) return OUT_OF_RESOURCES;
  if (stream && reinterpret_cast<Stream*>(stream)->capturing)
    return ++reinterpret_cast<Stream*>(stream)->launches, 0;  // part of a graph, not run
  if (!module.body) return 0;                                 // a test of launches alone
  std::vector<uint8_t> storage(module.params_bytes + 128);
  uint8_t* copy = storage.data() + (128 - uintptr_t(storage.data()) % 128) % 128;
  std::memcpy(copy, params[0], module.params_bytes);
  try {
    attn::emulation::machine.launch({int(grid_x), int(grid_y), int(grid_z)}, int(block_x),
                                    int(smem_bytes), module.body, copy);
  } catch (const std::exception&) {
    // as on a GPU: the launch itself went well, and every later call says that it did not
    const std::lock_guard<std::mutex> lock(guard);
    broken = LAUNCH_FAILED;
  }
  return 0;
}
FAKE cuTensorMapEncodeTiled(attn::ptx::TensorMap* map, int type, uint32_t rank, void* base,
                            const uint64_t* size, const uint64_t* stride, const uint32_t* box,
                            const uint32_t* steps, int interleave, int swizzle, int promotion,
                            int fill) {
  if (const Result error = enter("cuTensorMapEncodeTiled", false)) return error;
  if (reinterpret_cast<uintptr_t>(map) % 64 || reinterpret_cast<uintptr_t>(base) % 16)
    return INVALID_VALUE;
  if (rank != 4 || interleave || swizzle != TENSOR_SWIZZLE_128B || fill ||
      promotion != TENSOR_PROMOTION_256B || (type != TENSOR_FLOAT16 && type != TENSOR_BFLOAT16))
    return INVALID_VALUE;
  attn::ptx::TensorSpec spec = {base, type == TENSOR_BFLOAT16, {}, {}, {}};
  for (int i = 0; i < 4; ++i) {
    if (!size[i] || size[i] > uint64_t(1) << 32 || !box[i] || box[i] > 256 || !steps[i] ||
        steps[i] > 8 || (steps[i] != 1 && i != 1))
      return INVALID_VALUE;
    spec.size[i] = int64_t(size[i]), spec.box[i] = int((box[i] + steps[i] - 1) / steps[i]);
  }
  spec.row_step = int(steps[1]);
  for (int i = 0; i < 3; ++i) {
    if (stride[i] % 16 || stride[i] >= uint64_t(1) << 40) return INVALID_VALUE;
    spec.stride[i] = int64_t(stride[i]);
  }
  if (2 * box[0] > 128) return INVALID_VALUE;  // bytes of a row of the swizzle
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &spec, sizeof(spec));  // as the emulated copy engine reads it
  return 0;
}

// ---- what tests say and ask
// ----------------------------------------------------------------------
extern "C" {
#define CONTROL __attribute__((visibility("default")))
CONTROL void fake_reset(int count, const int* capabilities, int (*resolver)(const void*, Resolved*),
                        int init, int version) {
  const std::lock_guard<std::mutex> lock(guard);
  devices.assign(count, Device());
  for (int i = 0; i < count; ++i) {
    devices[i].capability = capabilities[i];
    devices[i].shared_memory = (capabilities[i] == 90   ? 227
                                : capabilities[i] == 80 ? 163
                                                        : 99) *
                               1024;
  }
  contexts.clear(), calls.clear(), alive.clear(), current.clear(), capturing.clear();
  resolve = resolver, broken = 0, initialized = false;
  init_result = init, driver_version = version;
}
CONTROL int fake_calls(const char* name) {
  const std::lock_guard<std::mutex> lock(guard);
  return calls[name];
}
CONTROL void* fake_stream(int device, int status) {
  const std::lock_guard<std::mutex> lock(guard);
  Context* context = &contexts.try_emplace(device, Context{device}).first->second;
  auto* made = new Stream{context, status, 0};
  alive.insert(context), alive.insert(made);
  if (status) capturing.insert(made);
  return made;
}
CONTROL void fake_capture(void* stream, int status) {
  const std::lock_guard<std::mutex> lock(guard);
  auto* of = reinterpret_cast<Stream*>(stream);
  of->capturing = status;
  status ? void(capturing.insert(of)) : void(capturing.erase(of));
}
// Runs a function as a kernel of one block; what went wrong, or null.
CONTROL const char* fake_run(void (*body)(void*), void* params, int threads, int smem_bytes) {
  static std::string fault;
  try {
    attn::emulation::machine.launch({1, 1, 1}, threads, smem_bytes, body, params);
  } catch (const std::exception& error) {
    return (fault = error.what()).c_str();
  }
  return nullptr;
}
CONTROL int fake_captured(void* stream) { return reinterpret_cast<Stream*>(stream)->launches; }
CONTROL void fake_shared_memory(int device, int bytes) { devices[device].shared_memory = bytes; }
CONTROL int fake_capture_mode() { return capture_mode; }
CONTROL int fake_depth() { return int(current.size()); }
CONTROL void fake_break(int error) { broken = error; }
}
