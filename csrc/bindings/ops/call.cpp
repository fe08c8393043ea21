#include "call.h"

#include <nanobind/stl/string.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <optional>

namespace flexcore::python {

namespace {

using Code = nb::dlpack::dtype_code;

std::optional<DType> to_dtype(nb::dlpack::dtype t) {
  const auto is = [&](Code code, int bits) {
    return t.code == static_cast<std::uint8_t>(code) && t.bits == bits && t.lanes == 1;
  };
  if (is(Code::Float, 32)) return DType::kFloat32;
  if (is(Code::Bfloat, 16)) return DType::kBFloat16;
  if (is(Code::Float, 16)) return DType::kFloat16;
  if (is(Code::Int, 32)) return DType::kInt32;
  if (is(Code::Int, 64)) return DType::kInt64;
  if (is(Code::UInt, 8)) return DType::kUInt8;
  return std::nullopt;
}

std::string name_of(nb::dlpack::dtype t) {
  const char* kind = t.code == static_cast<std::uint8_t>(Code::Float)     ? "float"
                     : t.code == static_cast<std::uint8_t>(Code::Int)     ? "int"
                     : t.code == static_cast<std::uint8_t>(Code::UInt)    ? "uint"
                     : t.code == static_cast<std::uint8_t>(Code::Bool)    ? "bool"
                     : t.code == static_cast<std::uint8_t>(Code::Complex) ? "complex"
                                                                          : "unknown";
  return t.code == static_cast<std::uint8_t>(Code::Bool) ? kind : kind + std::to_string(t.bits);
}

std::string class_name(nb::handle value) { return nb::cast<std::string>(nb::str(value.type().attr("__name__"))); }

std::string text_of(nb::handle value) {
  std::string text = nb::cast<std::string>(nb::repr(value));
  return python::shortened(std::move(text), 60);
}

/// numpy does not export its bfloat16 (package ml_dtypes) through DLPack, but shows the same memory as uint16.
bool is_numpy_bfloat16(nb::handle array) {
  return nb::hasattr(array, "view") && nb::hasattr(array, "dtype") &&
         nb::cast<std::string>(nb::str(nb::handle(array.attr("dtype")))) == "bfloat16" &&
         nb::hasattr(array, "__array_interface__");
}

/// True for an array on another device, whether or not it can be exported from there.
bool is_elsewhere(nb::handle array) {
  if (!nb::hasattr(array, "__dlpack_device__")) return false;
  try {
    return nb::cast<int>(array.attr("__dlpack_device__")()[0]) != nb::device::cpu::value;
  } catch (const std::exception&) {
    return false;
  }
}

/// A torch tensor as a capsule; any other array itself. torch's `__dlpack__` is Python that costs 7 us an array, the
/// function behind it half a microsecond.
nb::object exportable(nb::handle array) {
  static nb::handle tensor, to_dlpack;  // held for ever, like the module
  if (!tensor) {
    const nb::handle torch = PyDict_GetItemString(PyImport_GetModuleDict(), "torch");
    if (!torch || !nb::hasattr(torch, "utils") || !nb::hasattr(torch, "Tensor")) return nb::borrow(array);
    to_dlpack = nb::object(nb::module_::import_("torch.utils.dlpack").attr("to_dlpack")).release();
    tensor = nb::object(torch.attr("Tensor")).release();
  }
  if (!nb::isinstance(array, tensor)) return nb::borrow(array);
  try {
    return to_dlpack(array);
  } catch (nb::python_error&) {  // a tensor without memory, or in a layout of its own
    return nb::borrow(array);
  }
}

constexpr const char* kWanted = ", wanted the CPU or a CUDA GPU";

std::string name_of(Device device) {
  return device.kind == DeviceKind::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

/// Page-locked memory is the host's too.
std::optional<Device> to_device(int type, int index) {
  if (type == nb::device::cpu::value || type == nb::device::cuda_host::value) return Device{};
  if (type == nb::device::cuda::value || type == nb::device::cuda_managed::value)
    return Device{DeviceKind::kCuda, index};
  return std::nullopt;
}

struct Shared {
  std::mutex mutex;
  std::unique_ptr<ops::Runtime> cpu;
  std::map<int, std::unique_ptr<ops::Runtime>> gpus;
  pid_t process = 0;
};
// Never destroyed: a daemon thread may still be inside an op when the process ends.
Shared& shared() {
  static Shared* const state = std::make_unique<Shared>().release();
  return *state;
}

}  // namespace

std::mutex& Call::runtime_mutex() { return shared().mutex; }

ops::Runtime& Call::shared_runtime(Device device) {
  auto& state = shared();
  if (state.process != getpid()) {
    // The threads stayed in the process that this one was forked from.
    static_cast<void>(state.cpu.release());
    for (auto& [index, runtime] : state.gpus) static_cast<void>(runtime.release());
    state.gpus.clear();
    state.process = getpid();
  }
  auto& runtime = device.kind == DeviceKind::kCpu ? state.cpu : state.gpus[device.index];
  if (!runtime) runtime = std::make_unique<ops::Runtime>(device.kind == DeviceKind::kCpu ? 0 : 1, device);
  return *runtime;
}

void set_num_threads(int num_threads) {
  auto runtime = std::make_unique<ops::Runtime>(num_threads);
  const std::lock_guard lock(Call::runtime_mutex());
  Call::shared_runtime({});
  shared().cpu.swap(runtime);
}

int num_threads() {
  const std::lock_guard lock(Call::runtime_mutex());
  return Call::shared_runtime({}).num_threads();
}

void Call::refuse(nb::handle got, const char* name, const char* wanted) const {
  throw InvalidArgument(label(name) + " is " + text_of(got) + " (" + class_name(got) + "), wanted " + wanted);
}

Call::Placed Call::place(Array array, bool as_bfloat16, const char* name) {
  const auto device = to_device(array.device_type(), array.device_id());
  if (!device) throw Unsupported(label(name) + " is on DLPack device " + std::to_string(array.device_type()) + kWanted);
  const int ndim = static_cast<int>(array.ndim());
  if (ndim < 1 || ndim > TensorView::kMaxDims)
    throw InvalidArgument(label(name) + " has " + std::to_string(ndim) + " dimensions, wanted 1 to 4");
  const auto dtype = as_bfloat16 ? DType::kBFloat16 : to_dtype(array.dtype());
  if (!dtype)
    throw InvalidArgument(label(name) + " is " + name_of(array.dtype()) + ", wanted float32, bfloat16 or int32");
  void* data = const_cast<void*>(array.data());
  if (reinterpret_cast<std::uintptr_t>(data) % dtype_size(*dtype) != 0)
    throw InvalidArgument(label(name) + " is not aligned to its elements");
  const auto extent = [&](int i) { return static_cast<std::int64_t>(array.shape(i)); };
  TensorView out = ndim == 1   ? TensorView(data, *dtype, {extent(0)})
                   : ndim == 2 ? TensorView(data, *dtype, {extent(0), extent(1)})
                   : ndim == 3 ? TensorView(data, *dtype, {extent(0), extent(1), extent(2)})
                               : TensorView(data, *dtype, {extent(0), extent(1), extent(2), extent(3)});
  if (out.size() > 0)  // numpy's strides of an array without elements are all 0
    for (int i = 0; i < ndim; ++i) out.set_stride(i, array.stride(i));
  arrays_.push_back(std::move(array));
  return {out, *device};
}

TensorView Call::beside_others(const Placed& placed, const char* name) {
  if (first_ == nullptr) {
    device_ = placed.device;
    first_ = name;
  }
  if (placed.device != device_)
    throw InvalidArgument(label(name) + " is on " + name_of(placed.device) + ", " + first_ + " on " + name_of(device_) +
                          ", wanted both on one device");
  return placed.view;
}

Call::Placed Call::import(nb::handle array, const char* name) {
  if (Array in; nb::try_cast(exportable(array), in, false)) return place(std::move(in), false, name);
  if (is_numpy_bfloat16(array)) return place(nb::cast<Array>(array.attr("view")("uint16"), false), true, name);
  if (is_elsewhere(array)) throw Unsupported(label(name) + " is on a device that does not share its memory" + kWanted);
  refuse(array, name, "an array with __dlpack__ (numpy, torch, ...)");
}

TensorView Call::read(nb::handle array, const char* name) { return beside_others(import(array, name), name); }

TensorView Call::read_on_host(nb::handle array, const char* name) {
  const Placed placed = import(array, name);
  TensorView view = placed.view;
  // With more dimensions it is nothing that an op reads: its shape is refused.
  if (placed.device.kind == DeviceKind::kCpu || view.size() == 0 || view.ndim() > 2) return view;
  std::int64_t span = 1;  // elements from the first to behind the last
  for (int i = 0; i < view.ndim(); ++i) {
    if (view.stride(i) < 0) throw InvalidArgument(label(name) + " has a negative stride");
    span += (view.shape(i) - 1) * view.stride(i);
  }
  auto& copy = host_copies_.emplace_back(static_cast<std::size_t>(span) * dtype_size(view.dtype()));
  {
    const python::Released released;
    const std::lock_guard lock(runtime_mutex());
    ops::Runtime& runtime = shared_runtime(placed.device);
    runtime.synchronously([&] { runtime.download(copy.data(), view.data(), copy.size()); });
  }
  TensorView out = view.ndim() == 1 ? TensorView(copy.data(), view.dtype(), {view.shape(0)})
                                    : TensorView(copy.data(), view.dtype(), {view.shape(0), view.shape(1)});
  for (int i = 0; i < out.ndim(); ++i) out.set_stride(i, view.stride(i));
  return out;
}

TensorView Call::read_on_host_optional(nb::handle array, const char* name) {
  return array.is_none() ? TensorView() : read_on_host(array, name);
}

TensorView Call::write(nb::handle array, const char* name) {
  using Writable = nb::ndarray<>;
  if (Writable out; nb::try_cast(exportable(array), out, false))
    return beside_others(place(Array(out), false, name), name);
  if (is_numpy_bfloat16(array))
    if (Writable out; nb::try_cast(array.attr("view")("uint16"), out, false))
      return beside_others(place(Array(out), true, name), name);
  read(array, name);  // names what else may be wrong with it
  throw InvalidArgument(label(name) + " is read-only, wanted an array to write to");
}

TensorView Call::read_optional(nb::handle array, const char* name) {
  return array.is_none() ? TensorView() : read(array, name);
}

TensorView Call::write_optional(nb::handle array, const char* name) {
  return array.is_none() ? TensorView() : write(array, name);
}

namespace {

template <class T>
bool convert(nb::handle value, T& out) {
  return !nb::isinstance<nb::str>(value) && nb::try_cast(value, out, true);
}

}  // namespace

double Call::number(nb::handle value, const char* name) const {
  double out = 0;
  if (!convert(value, out)) refuse(value, name, "a number");
  return out;
}

std::int64_t Call::integer(nb::handle value, const char* name) const {
  std::int64_t out = 0;
  if (!convert(value, out)) refuse(value, name, "an int");
  return out;
}

std::uint64_t Call::unsigned_integer(nb::handle value, const char* name) const {
  std::uint64_t out = 0;
  if (!convert(value, out)) refuse(value, name, "an int >= 0");
  return out;
}

}  // namespace flexcore::python
