#include "bindings/tensor.h"

namespace tml {
namespace {

// The exchange table of the one tensor type we meet: torch.Tensor and its subclasses.
const DLPackExchangeAPI* exchange_of(PyTypeObject* type) {
  static PyTypeObject* cached_type = nullptr;
  static const DLPackExchangeAPI* cached_api = nullptr;
  if (type == cached_type) return cached_api;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  auto* api =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);  // the table lives as long as the process
  if (api == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  if (api->header.version.major != DLPACK_MAJOR_VERSION ||
      api->dltensor_from_py_object_no_sync == nullptr)
    return nullptr;
  Py_INCREF(reinterpret_cast<PyObject*>(type));
  cached_type = type;
  cached_api = api;
  return api;
}

bool to_dtype(const DLDataType& type, DType* out) {
  if (type.lanes != 1) return false;
  if (type.code == kDLFloat && type.bits == 32) return *out = DType::kF32, true;
  if (type.code == kDLBfloat && type.bits == 16) return *out = DType::kBf16, true;
  if (type.code == kDLInt && type.bits == 32) return *out = DType::kI32, true;
  if (type.code == kDLInt && type.bits == 64) return *out = DType::kI64, true;
  if (type.code == kDLUInt && type.bits == 8) return *out = DType::kU8, true;
  return false;
}

std::string dims_text(const std::int64_t* dims, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += dims[i] == kAny ? "*" : std::to_string(dims[i]);
  }
  return text + "]";
}

}  // namespace

Tensor::Tensor(nb::handle object, const char* op, const char* name, Place place)
    : op_(op), name_(name) {
  const std::string where = std::string(op) + ": " + name;
  PyTypeObject* type = Py_TYPE(object.ptr());
  const DLPackExchangeAPI* api = exchange_of(type);
  if (api == nullptr) {
    const nb::object type_name = nb::steal(PyType_GetName(type));
    throw ArgumentTypeError(where + " must be a torch.Tensor, got " + nb::str(type_name).c_str());
  }
  if (api->dltensor_from_py_object_no_sync(object.ptr(), &view_) != 0) {
    PyErr_Clear();
    throw ArgumentTypeError(where + " must be a dense tensor with storage (not meta or sparse)");
  }
  const bool is_cpu = view_.device.device_type == kDLCPU;
  if (place == Place::kCpu && !is_cpu)
    throw ArgumentError(where + " must be on the CPU, got a tensor on another device");
  if (place == Place::kCuda && view_.device.device_type != kDLCUDA)
    throw ArgumentError(where + " must be on a CUDA device, got a tensor " +
                        (is_cpu ? "on the CPU" : "on another device"));
  if (!to_dtype(view_.dtype, &dtype_))
    throw ArgumentError(where + " has an unsupported dtype (expected float32, bfloat16, int32, " +
                        "int64 or uint8)");
}

void Tensor::refuse(const std::string& expected, const std::string& got) const {
  throw ArgumentError(std::string(op_) + ": " + name_ + " must be " + expected + ", got " + got);
}

std::string Tensor::shape_text() const { return dims_text(view_.shape, view_.ndim); }

const Tensor& Tensor::dtype(DType expected) const {
  if (dtype_ != expected) refuse(name_of(expected), name_of(dtype_));
  return *this;
}

const Tensor& Tensor::floating() const {
  if (dtype_ != DType::kF32 && dtype_ != DType::kBf16)
    refuse("float32 or bfloat16", name_of(dtype_));
  return *this;
}

const Tensor& Tensor::shape(std::initializer_list<std::int64_t> dims) const {
  bool same = static_cast<int>(dims.size()) == view_.ndim;
  int i = 0;
  if (same)
    for (const std::int64_t dim : dims) {
      same = same && (dim == kAny || dim == view_.shape[i]);
      ++i;
    }
  if (!same)
    refuse("of shape " + dims_text(dims.begin(), static_cast<int>(dims.size())), shape_text());
  return *this;
}

const Tensor& Tensor::rank(int expected) const {
  if (view_.ndim != expected) refuse(std::to_string(expected) + "-dimensional", shape_text());
  return *this;
}

std::int64_t Tensor::stride(int dim) const {
  if (view_.strides != nullptr) return view_.strides[dim];
  std::int64_t stride = 1;
  for (int i = view_.ndim - 1; i > dim; --i) stride *= view_.shape[i];
  return stride;
}

std::int64_t Tensor::numel() const {
  std::int64_t count = 1;
  for (int i = 0; i < view_.ndim; ++i) count *= view_.shape[i];
  return count;
}

const Tensor& Tensor::contiguous() const {
  std::int64_t expected = 1;
  for (int i = view_.ndim - 1; i >= 0; --i) {
    if (view_.shape[i] != 1 && stride(i) != expected && numel() != 0)
      refuse("contiguous", "strides that are not (shape " + shape_text() + ")");
    expected *= view_.shape[i];
  }
  return *this;
}

const Tensor& Tensor::rows_contiguous() const {
  if (view_.ndim > 0 && view_.shape[view_.ndim - 1] > 1 && stride(view_.ndim - 1) != 1)
    refuse("dense in its last dimension", "stride " + std::to_string(stride(view_.ndim - 1)));
  return *this;
}

const Tensor& Tensor::aligned(std::size_t num_bytes) const {
  if (reinterpret_cast<std::uintptr_t>(data()) % num_bytes != 0)
    refuse("aligned to " + std::to_string(num_bytes) + " bytes", "a misaligned pointer");
  return *this;
}

void* current_cuda_stream(nb::handle tensor, int device_id) {
  const DLPackExchangeAPI* api = exchange_of(Py_TYPE(tensor.ptr()));
  void* stream = nullptr;
  if (api == nullptr || api->current_work_stream == nullptr ||
      api->current_work_stream(kDLCUDA, device_id, &stream) != 0) {
    PyErr_Clear();
    throw ArgumentError("cuda: torch told no current stream of device " +
                        std::to_string(device_id));
  }
  return stream;
}

}  // namespace tml
