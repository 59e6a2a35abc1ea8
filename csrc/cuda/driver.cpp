// Devices and launches by NVIDIA's driver: launch.h's second half for GPUs.
#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "driver_api.h"

namespace attn::cuda {
namespace driver {
namespace {

struct Function {
  std::string kernel;
  Handle handle = nullptr;
  std::atomic<int> smem_bytes{48 * 1024};  // that a CTA may have: at first what every kernel may
};

struct Device {
  DeviceId id = 0;
  int capability = 0, multiprocessors = 0, shared_memory = 0, l2_bytes = 0;
  std::mutex creating;                   // the context; a function's module, its shared memory
  std::atomic<Handle> context{nullptr};  // torch's: the primary one
  std::shared_mutex guard;               // of functions; held for no call that may take long
  std::unordered_map<std::string, std::unique_ptr<Function>> functions;
  std::atomic<const Function*> last{nullptr};  // what was launched last
};

struct Driver {
  Api api;
  std::string why;  // it cannot be used; empty: it can
  int version = 0;
  std::vector<std::unique_ptr<Device>> devices;
};

Compile& compiler() {
  static auto* held = new Compile;  // never destroyed: Python's objects end before it would
  return *held;
}

std::string text_of(const Api& api, Result error) {
  const char *name = nullptr, *text = nullptr;
  if (api.error_name) api.error_name(error, &name);
  if (api.error_string) api.error_string(error, &text);
  return (name ? name : "error " + std::to_string(error)) + (text ? std::string(": ") + text : "");
}

void check(const Driver& driver, Result result, const std::string& what) {
  if (result != SUCCESS) throw std::runtime_error(what + ": " + text_of(driver.api, result));
}

int attribute(const Driver& driver, int which, DeviceId device) {
  int value = 0;
  check(driver, driver.api.device_attribute(&value, which, device), "cuDeviceGetAttribute");
  return value;
}

// Fills the table; the first symbol that the library lacks, or "".
std::string resolve(Api& api, void* library) {
  std::string missing;
  const auto find = [&](auto& field, const char* symbol, bool needed) {
    field = reinterpret_cast<std::decay_t<decltype(field)>>(dlsym(library, symbol));
    if (!field && needed && missing.empty()) missing = symbol;
  };
#define ATTN_FIND(field, symbol, arguments) find(api.field, symbol, true);
  ATTN_DRIVER(ATTN_FIND)
#undef ATTN_FIND
#define ATTN_FIND(field, symbol, arguments) find(api.field, symbol, false);
  ATTN_DRIVER_LATER(ATTN_FIND)
#undef ATTN_FIND
  return missing;
}

void list_devices(Driver& driver) {
  int count = 0;
  check(driver, driver.api.device_count(&count), "cuDeviceGetCount");
  for (int i = 0; i < count; ++i) {
    auto device = std::make_unique<Device>();
    check(driver, driver.api.device_get(&device->id, i), "cuDeviceGet");
    device->capability = 10 * attribute(driver, ATTRIBUTE_CAPABILITY_MAJOR, device->id) +
                         attribute(driver, ATTRIBUTE_CAPABILITY_MINOR, device->id);
    device->multiprocessors = attribute(driver, ATTRIBUTE_MULTIPROCESSOR_COUNT, device->id);
    device->shared_memory = attribute(driver, ATTRIBUTE_SHARED_MEMORY_OPTIN, device->id);
    device->l2_bytes = attribute(driver, ATTRIBUTE_L2_CACHE_SIZE, device->id);
    driver.devices.push_back(std::move(device));
  }
}

// Why the library cannot be used; "" where it can, and all devices are listed.
std::string begin(Driver& driver, const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return std::string("NVIDIA's driver is not installed: ") + dlerror();
  const std::string missing = resolve(driver.api, library);
  if (!missing.empty()) return std::string(path) + " is too old: it has no " + missing;
  const Result result = driver.api.init(0);
  if (result != SUCCESS) return "cuInit: " + text_of(driver.api, result);
  try {
    check(driver, driver.api.driver_version(&driver.version), "cuDriverGetVersion");
    list_devices(driver);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return driver.devices.empty() ? "the driver sees no CUDA device" : "";
}

std::atomic<Driver*> opened{nullptr};
std::mutex opening;

Driver& get(const char* path = nullptr) {
  Driver* driver = opened.load(std::memory_order_acquire);
  if (driver && !path) return *driver;
  const std::lock_guard<std::mutex> lock(opening);
  if (!path && opened.load()) return *opened.load();
  driver = new Driver;  // never destroyed: the driver's own objects end before ours would
  driver->why = begin(*driver, path ? path : "libcuda.so.1");
  opened.store(driver, std::memory_order_release);
  return *driver;
}

Device& device_at(Driver& driver, int index) {
  if (!driver.why.empty()) throw std::runtime_error(driver.why);
  if (index < 0 || index >= int(driver.devices.size()))
    throw std::runtime_error("no CUDA device " + std::to_string(index));
  return *driver.devices[index];
}

// The device's primary context is current in this thread, for as long as the launches take: a
// thread that has not used CUDA yet (an autograd worker) has none.
class Current {
 public:
  Current(Driver& driver, Device& device) : driver_(driver) {
    Handle before = nullptr;
    check(driver, driver.api.current_context(&before), "cuCtxGetCurrent");
    Handle wanted = device.context.load(std::memory_order_acquire);
    if (!wanted) wanted = retain(driver, device);
    if (before == wanted) return;
    check(driver, driver.api.push_context(wanted), "cuCtxPushCurrent");
    pushed_ = true;
  }
  ~Current() {
    Handle popped = nullptr;
    if (pushed_) driver_.api.pop_context(&popped);
  }
  Current(const Current&) = delete;

 private:
  static Handle retain(Driver& driver, Device& device) {
    const std::lock_guard<std::mutex> lock(device.creating);
    Handle context = device.context.load();
    if (!context) {
      check(driver, driver.api.retain_context(&context, device.id), "cuDevicePrimaryCtxRetain");
      device.context.store(context, std::memory_order_release);
    }
    return context;
  }

  Driver& driver_;
  bool pushed_ = false;
};

// Another stream may be captured into a graph, by any thread: for as long as this lives, what this
// thread asks of the driver, and no stream does, neither fails for that nor ends that capture.
class Uncaptured {
 public:
  explicit Uncaptured(Driver& driver) : driver_(driver) {
    check(driver, driver.api.exchange_capture_mode(&mode_), "cuThreadExchangeStreamCaptureMode");
  }
  ~Uncaptured() { driver_.api.exchange_capture_mode(&mode_); }
  Uncaptured(const Uncaptured&) = delete;

 private:
  Driver& driver_;
  int mode_ = CAPTURE_MODE_RELAXED;  // then the mode of before
};

class Stream : public Executor {
 public:
  Stream(Driver& driver, Device& device, const Target& target)
      : driver_(driver), device_(device), index_(target.device) {
    stream_ = reinterpret_cast<Handle>(target.stream);
  }

  void launch(const Launch& x) override {
    Function& function = find(x);
    if (x.smem_bytes > function.smem_bytes.load(std::memory_order_acquire)) allow(function, x);
    void* params[] = {const_cast<void*>(x.params)};
    require(driver_.api.launch_kernel(function.handle, x.grid.x, x.grid.y, x.grid.z, x.threads, 1,
                                      1, x.smem_bytes, stream_, params, nullptr),
            "launch of", x.kernel);
    device_.last.store(&function, std::memory_order_release);
  }

  ptx::TensorMap tensor_map(const ptx::TensorSpec& t) override {
    if (const char* why = tensor_problem(t); *why) throw std::invalid_argument(why);
    if (!driver_.api.encode_tensor)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: CUDA 12.0 is needed");
    uint64_t size[4], stride[3];
    uint32_t box[4], steps[4] = {1, uint32_t(t.row_step), 1, 1};
    for (int i = 0; i < 4; ++i)
      size[i] = uint64_t(t.size[i]), box[i] = uint32_t(t.box[i]) * steps[i];
    for (int i = 0; i < 3; ++i) stride[i] = uint64_t(t.stride[i]);
    // Not into what is returned: g++ may put that where the caller's frame is aligned to 16 bytes
    // only.
    alignas(ptx::TensorMap) unsigned char encoded[sizeof(ptx::TensorMap)];
    check(driver_,
          driver_.api.encode_tensor(reinterpret_cast<ptx::TensorMap*>(encoded),
                                    t.is_bf16 ? TENSOR_BFLOAT16 : TENSOR_FLOAT16, 4,
                                    const_cast<void*>(t.base), size, stride, box, steps, 0,
                                    TENSOR_SWIZZLE_128B, TENSOR_PROMOTION_256B, 0),
          "cuTensorMapEncodeTiled");
    ptx::TensorMap map;
    std::memcpy(&map, encoded, sizeof(map));
    return map;
  }

  void clear(int* words, int64_t count) override {
    require(driver_.api.set_words(reinterpret_cast<uintptr_t>(words), 0, size_t(count), stream_),
            "clearing", "the counter of tiles");
  }

 private:
  // What fails here may be an earlier kernel, whose error a GPU reports late.
  void require(Result result, const std::string& what, const std::string& kernel) {
    if (result == SUCCESS) return;
    const Function* last = device_.last.load(std::memory_order_acquire);
    throw std::runtime_error(what + " " + kernel + " on cuda:" + std::to_string(index_) + ": " +
                             text_of(driver_.api, result) +
                             (last ? " (attn_ext launched " + last->kernel + " before)" : ""));
  }

  Function& find(const Launch& x) {
    {
      const std::shared_lock<std::shared_mutex> lock(device_.guard);
      const auto known = device_.functions.find(x.kernel);
      if (known != device_.functions.end()) return *known->second;
    }
    refuse_capture(x.kernel);
    if (!compiler()) throw std::runtime_error("no compiler was set");
    const Image image = compiler()(x.kernel, device_.capability);
    const std::lock_guard<std::mutex> one(device_.creating);
    {
      const std::shared_lock<std::shared_mutex> lock(device_.guard);
      const auto known = device_.functions.find(x.kernel);  // by another thread meanwhile
      if (known != device_.functions.end()) return *known->second;
    }
    auto function = load(x.kernel, image);
    const std::lock_guard<std::shared_mutex> lock(device_.guard);
    return *device_.functions.emplace(x.kernel, std::move(function)).first->second;
  }

  std::unique_ptr<Function> load(const std::string& kernel, const Image& image) {
    const Uncaptured uncaptured(driver_);
    auto function = std::make_unique<Function>();
    function->kernel = kernel;
    Handle module = nullptr;
    require(driver_.api.load_module(&module, image.cubin.data()), "loading", kernel);
    require(driver_.api.get_function(&function->handle, module, image.symbol.c_str()),
            "finding " + image.symbol + " of", kernel);
    return function;
  }

  // Never less than another thread's launch of the same kernel takes.
  void allow(Function& function, const Launch& x) {
    const std::lock_guard<std::mutex> one(device_.creating);
    if (x.smem_bytes <= function.smem_bytes.load()) return;
    require(
        driver_.api.set_attribute(function.handle, FUNCTION_DYNAMIC_SHARED_MEMORY, x.smem_bytes),
        std::to_string(x.smem_bytes) + " bytes of shared memory for", x.kernel);
    function.smem_bytes.store(x.smem_bytes, std::memory_order_release);
  }

  // To compile and to load are no work of a stream that a graph could hold.
  void refuse_capture(const std::string& kernel) {
    int status = 0;
    const Result result = driver_.api.is_capturing(stream_, &status);
    if (result != ERROR_STREAM_CAPTURE_IMPLICIT)
      require(result, "asking the stream before", kernel);
    if (status || result)
      throw std::runtime_error("a CUDA graph is being captured, and " + kernel +
                               " was not used on cuda:" + std::to_string(index_) +
                               " yet: make the same call once before the capture; "
                               "`attn-ext compile` makes that call short");
  }

  Driver& driver_;
  Device& device_;
  int index_;
  Handle stream_;
};

}  // namespace

void set_compile(Compile compile) { compiler() = std::move(compile); }
int version() { return get().version; }
std::string problem() { return get().why; }
int capability(int device) { return device_at(get(), device).capability; }
void open(const std::string& path) { get(path.c_str()); }

}  // namespace driver

void on_device(const Target& target, const std::function<void(Executor&)>& use) {
  driver::Driver& driver = driver::get();
  driver::Device& device = driver::device_at(driver, target.device);
  const driver::Current current(driver, device);
  driver::Stream stream(driver, device, target);
  use(stream);
}

std::string device_problem(int device) {
  driver::Driver& driver = driver::get();
  if (!driver.why.empty()) return driver.why;
  if (device < 0 || device >= int(driver.devices.size()))
    return "no CUDA device " + std::to_string(device);
  const int capability = driver.devices[device]->capability;
  if (capability >= 80) return "";
  return "the device has compute capability " + std::to_string(capability / 10) + "." +
         std::to_string(capability % 10) + ", the kernels need 8.0 or newer";
}

std::string sm90_problem(int device) {
  return driver::capability(device) == 90 ? ""
                                          : "the device is no Hopper GPU (compute capability 9.0)";
}

int multiprocessors(int device) { return driver::device_at(driver::get(), device).multiprocessors; }
int shared_memory(int device) { return driver::device_at(driver::get(), device).shared_memory; }
int l2_bytes(int device) { return driver::device_at(driver::get(), device).l2_bytes; }

}  // namespace attn::cuda
