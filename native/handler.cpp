// What XLA calls on the host: one handler of its foreign function interface (FFI), which runs Python functions on torch
// tensors over XLA's buffers.
//
// A compiled program names a `Call` by a number. The handler takes the GIL, finds the `Call`, gives its function a list
// of tensors over the inputs and a list of the outputs' addresses, and turns what it raises into an FFI error. A tensor
// holds nothing but an address, a shape and a dtype, so it is kept for the next time that XLA uses the same address; XLA
// does so nearly always.
//
// Torch makes the tensors, by the table of functions that it publishes (`torch.Tensor.__dlpack_c_exchange_api__`). This
// file knows the layouts of XLA's FFI and of DLPack from their headers, and links against neither XLA nor torch.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "dlpack/dlpack.h"
#include "xla/ffi/api/c_api.h"

namespace {

constexpr size_t kKeptTensors = 16;  // of one input; XLA alternates between few addresses

// A new reference, or null with a Python exception set; released at the end of the scope.
class Owned {
 public:
  explicit Owned(PyObject* object = nullptr) : object_(object) {}
  Owned(Owned&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_;
};

// -- tensors over XLA's memory ------------------------------------------------------------------------------------

const DLPackExchangeAPI* torch_api = nullptr;

// What torch asks to be deleted when a tensor goes. The memory behind it is XLA's.
struct Unowned {
  DLManagedTensorVersioned managed;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

void DeleteUnowned(DLManagedTensorVersioned* managed) { delete static_cast<Unowned*>(managed->manager_ctx); }

struct Input {
  DLDataType dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  std::vector<std::pair<void*, PyObject*>> tensors;  // the last one that was made is the first

  void Clear() {
    auto old = std::move(tensors);
    tensors.clear();
    for (auto& [address, tensor] : old) Py_DECREF(tensor);
  }

  // A borrowed reference; null with an exception.
  PyObject* At(void* address) {
    for (auto& [known, tensor] : tensors) {
      if (known == address) return tensor;
    }
    PyObject* tensor = New(address);
    if (tensor == nullptr) return nullptr;
    if (tensors.size() >= kKeptTensors) Clear();
    tensors.emplace_back(address, tensor);
    return tensor;
  }

 private:
  PyObject* New(void* address) const {
    auto* unowned = new Unowned{};
    unowned->shape = shape;
    unowned->strides = strides;
    DLManagedTensorVersioned& managed = unowned->managed;
    managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    managed.manager_ctx = unowned;
    managed.deleter = DeleteUnowned;
    managed.dl_tensor.data = address;
    managed.dl_tensor.device = {kDLCPU, 0};
    managed.dl_tensor.ndim = static_cast<int32_t>(shape.size());
    managed.dl_tensor.dtype = dtype;
    managed.dl_tensor.shape = unowned->shape.data();
    managed.dl_tensor.strides = unowned->strides.data();
    void* tensor = nullptr;
    if (torch_api->managed_tensor_to_py_object_no_sync(&managed, &tensor) != 0) {
      if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "torch could not make a tensor over XLA's memory");
      return nullptr;
    }
    return static_cast<PyObject*>(tensor);
  }
};

// -- calls --------------------------------------------------------------------------------------------------------

struct CallObject {
  PyObject_HEAD
  uint64_t number;
  PyObject* function;
  std::vector<Input>* inputs;
};

// By their numbers; guarded by the GIL.
std::unordered_map<uint64_t, CallObject*>& Calls() {
  static auto* calls = new std::unordered_map<uint64_t, CallObject*>();
  return *calls;
}

// Runs the function of a call; false with an exception set.
bool Run(CallObject* call, const XLA_FFI_CallFrame* frame) {
  std::vector<Input>& inputs = *call->inputs;
  if (frame->args.size != static_cast<int64_t>(inputs.size())) {
    PyErr_SetString(PyExc_RuntimeError, "pytorch2jax: XLA passed another number of arrays than the call has");
    return false;
  }
  Owned tensors(PyList_New(static_cast<Py_ssize_t>(inputs.size())));
  if (!tensors) return false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    auto* buffer = static_cast<XLA_FFI_Buffer*>(frame->args.args[i]);
    PyObject* tensor = inputs[i].At(buffer->data);
    if (tensor == nullptr) return false;
    PyList_SET_ITEM(tensors.get(), static_cast<Py_ssize_t>(i), Py_NewRef(tensor));
  }
  Owned addresses(PyList_New(static_cast<Py_ssize_t>(frame->rets.size)));
  if (!addresses) return false;
  for (int64_t i = 0; i < frame->rets.size; ++i) {
    PyObject* address = PyLong_FromVoidPtr(static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i])->data);
    if (address == nullptr) return false;
    PyList_SET_ITEM(addresses.get(), static_cast<Py_ssize_t>(i), address);
  }
  PyObject* arguments[] = {tensors.get(), addresses.get()};
  return static_cast<bool>(Owned(PyObject_Vectorcall(call->function, arguments, 2, nullptr)));
}

// The text of the exception that is set, which is cleared. An interrupt is raised again in the main thread.
std::string TakeError() {
  Owned type, value, traceback;
  PyObject *type_ptr, *value_ptr, *traceback_ptr;
  PyErr_Fetch(&type_ptr, &value_ptr, &traceback_ptr);
  PyErr_NormalizeException(&type_ptr, &value_ptr, &traceback_ptr);
  Owned held_type(type_ptr), held_value(value_ptr), held_traceback(traceback_ptr);
  if (PyErr_GivenExceptionMatches(type_ptr, PyExc_KeyboardInterrupt)) {
    PyErr_SetInterrupt();
    return "KeyboardInterrupt";
  }
  Owned text(value_ptr == nullptr ? nullptr : PyObject_Str(value_ptr));
  const char* utf8 = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
  if (utf8 == nullptr) {
    PyErr_Clear();
    return "an exception without a text";
  }
  return utf8;
}

// -- sizes --------------------------------------------------------------------------------------------------------

bool IsInteger(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_S16:
    case XLA_FFI_DataType_S32:
    case XLA_FFI_DataType_S64:
    case XLA_FFI_DataType_U8:
    case XLA_FFI_DataType_U16:
    case XLA_FFI_DataType_U32:
    case XLA_FFI_DataType_U64:
      return true;
    default:
      return false;
  }
}

// In bytes; zero for what torch does not have.
size_t ItemSize(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_PRED:
    case XLA_FFI_DataType_S8:
    case XLA_FFI_DataType_U8:
      return 1;
    case XLA_FFI_DataType_S16:
    case XLA_FFI_DataType_U16:
    case XLA_FFI_DataType_F16:
    case XLA_FFI_DataType_BF16:
      return 2;
    case XLA_FFI_DataType_S32:
    case XLA_FFI_DataType_U32:
    case XLA_FFI_DataType_F32:
      return 4;
    case XLA_FFI_DataType_S64:
    case XLA_FFI_DataType_U64:
    case XLA_FFI_DataType_F64:
    case XLA_FFI_DataType_C64:
      return 8;
    case XLA_FFI_DataType_C128:
      return 16;
    default:
      return 0;
  }
}

// -- the handler --------------------------------------------------------------------------------------------------

// How many calls are in Python, and whether the interpreter is about to end. Afterwards no call may enter it.
std::mutex gate_mutex;
std::condition_variable gate_opens;
int n_inside = 0;
bool closed = false;
bool results_unwanted = false;
std::thread::id main_thread;

bool Enter() {
  std::lock_guard<std::mutex> lock(gate_mutex);
  if (closed) return false;
  ++n_inside;
  return true;
}

void Leave() {
  std::lock_guard<std::mutex> lock(gate_mutex);
  --n_inside;
  gate_opens.notify_all();
}

// When the interpreter ends, a daemon thread of Python's must not come back into it. CPython hangs such a thread where it
// next asks for the GIL (from 3.14 on; before, it unwinds the thread's stack, which C++ code does not survive). Here it
// hangs before that.
void HangIfEnding() {
  {
    std::lock_guard<std::mutex> lock(gate_mutex);
    if (!closed || std::this_thread::get_id() == main_thread || PyGILState_GetThisThreadState() == nullptr) return;
  }
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

// Fill the outputs with what ends most loops: NaN, with which no number compares, large integers, and false.
void FillWithNothing(const XLA_FFI_CallFrame* frame) {
  for (int64_t i = 0; i < frame->rets.size; ++i) {
    auto* buffer = static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i]);
    size_t n = ItemSize(buffer->dtype);
    for (int64_t d = 0; d < buffer->rank; ++d) n *= static_cast<size_t>(buffer->dims[d]);
    if (n > 0) std::memset(buffer->data, IsInteger(buffer->dtype) ? 0x7F : buffer->dtype == XLA_FFI_DataType_PRED ? 0 : 0xFF, n);
  }
}

XLA_FFI_Error* Error(const XLA_FFI_CallFrame* frame, const std::string& message) {
  XLA_FFI_Error_Create_Args arguments{};
  arguments.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  arguments.message = message.c_str();
  arguments.errc = XLA_FFI_Error_Code_INTERNAL;
  return frame->api->XLA_FFI_Error_Create(&arguments);
}

uint64_t NumberOf(const XLA_FFI_CallFrame* frame) {
  auto* scalar = static_cast<XLA_FFI_Scalar*>(frame->attrs.attrs[0]);
  return *static_cast<uint64_t*>(scalar->value);
}

XLA_FFI_Error* Handle(XLA_FFI_CallFrame* frame) {
  for (auto* extension = frame->extension_start; extension != nullptr; extension = extension->next) {
    if (extension->type == XLA_FFI_Extension_Metadata) {  // XLA asks once, when the handler is registered
      auto* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(extension)->metadata;
      metadata->api_version.major_version = 0;
      metadata->api_version.minor_version = 1;  // the lowest with this layout; minor versions only add to it
      metadata->traits = 0;
      return nullptr;
    }
  }
  if (!Enter()) {
    HangIfEnding();
    if (!results_unwanted) return Error(frame, "pytorch2jax: the interpreter is ending, and torch does not run any more");
    FillWithNothing(frame);
    return nullptr;
  }
  std::string message;
  bool succeeded;
  {
    PyGILState_STATE state = PyGILState_Ensure();
    auto found = Calls().find(NumberOf(frame));
    if (found == Calls().end()) {
      succeeded = false;
      message =
          "pytorch2jax: expected a program that was compiled in this process, got one from another process, which has "
          "the torch function that it calls. A compiled program with torch calls cannot be saved or sent: compile it "
          "here, or convert with `backend=\"xla\"`.";
    } else {
      CallObject* call = found->second;
      Py_INCREF(call);
      succeeded = Run(call, frame);
      if (!succeeded) message = TakeError();
      Py_DECREF(call);
    }
    PyGILState_Release(state);
  }
  Leave();
  HangIfEnding();
  return succeeded ? nullptr : Error(frame, message);
}

// -- the Python module --------------------------------------------------------------------------------------------

bool ParseInput(PyObject* description, Input* input) {
  PyObject *example, *shape;
  if (!PyArg_ParseTuple(description, "OO!", &example, &PyTuple_Type, &shape)) return false;
  DLTensor of_example;
  if (torch_api->dltensor_from_py_object_no_sync(example, &of_example) != 0) return false;
  input->dtype = of_example.dtype;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape); ++i) {
    int64_t size = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
    if (size == -1 && PyErr_Occurred()) return false;
    input->shape.push_back(size);
  }
  input->strides.resize(input->shape.size());
  int64_t stride = 1;
  for (size_t i = input->shape.size(); i-- > 0; stride *= input->shape[i]) input->strides[i] = stride;
  return true;
}

PyObject* CallNew(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"number", "function", "inputs", nullptr};
  unsigned long long number;
  PyObject *function, *inputs;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "KOO!", const_cast<char**>(names), &number, &function,
                                   &PyTuple_Type, &inputs)) {
    return nullptr;
  }
  if (torch_api == nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "pytorch2jax._native: use_torch was not called");
    return nullptr;
  }
  auto parsed = std::make_unique<std::vector<Input>>(PyTuple_GET_SIZE(inputs));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(inputs); ++i) {
    if (!ParseInput(PyTuple_GET_ITEM(inputs, i), &(*parsed)[i])) return nullptr;
  }
  auto* self = reinterpret_cast<CallObject*>(type->tp_alloc(type, 0));
  if (self == nullptr) return nullptr;
  self->number = number;
  self->function = Py_NewRef(function);
  self->inputs = parsed.release();
  Calls()[number] = self;
  return reinterpret_cast<PyObject*>(self);
}

int CallTraverse(CallObject* self, visitproc visit, void* arg) {
  Py_VISIT(self->function);
  for (Input& input : *self->inputs) {
    for (auto& [address, tensor] : input.tensors) Py_VISIT(tensor);
  }
  return 0;
}

int CallClear(CallObject* self) {
  Py_CLEAR(self->function);
  for (Input& input : *self->inputs) input.Clear();
  return 0;
}

void CallDealloc(CallObject* self) {
  PyObject_GC_UnTrack(self);
  auto found = Calls().find(self->number);
  if (found != Calls().end() && found->second == self) Calls().erase(found);
  CallClear(self);
  delete self->inputs;
  Py_TYPE(self)->tp_free(self);
}

PyObject* CallForget(PyObject* self, PyObject*) {
  for (Input& input : *reinterpret_cast<CallObject*>(self)->inputs) input.Clear();
  Py_RETURN_NONE;
}

PyMethodDef call_methods[] = {
    {"forget", CallForget, METH_NOARGS, "Make new tensors from now on."},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject call_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

PyObject* UseTorch(PyObject*, PyObject* capsule) {
  auto* header = static_cast<DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  while (header != nullptr && header->version.major > DLPACK_MAJOR_VERSION) header = header->prev_api;
  if (header == nullptr || header->version.major != DLPACK_MAJOR_VERSION) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "torch has another version of DLPack");
    return nullptr;
  }
  torch_api = reinterpret_cast<const DLPackExchangeAPI*>(header);
  Py_RETURN_NONE;
}

PyObject* Handler(PyObject*, PyObject*) {
  return PyCapsule_New(reinterpret_cast<void*>(&Handle), "xla._CUSTOM_CALL_TARGET", nullptr);
}

PyObject* NumberOfCalls(PyObject*, PyObject*) { return PyLong_FromSize_t(Calls().size()); }

PyObject* Close(PyObject*, PyObject* arguments) {
  double seconds;
  int unwanted;
  if (!PyArg_ParseTuple(arguments, "dp", &seconds, &unwanted)) return nullptr;
  bool emptied;
  Py_BEGIN_ALLOW_THREADS;
  {
    std::unique_lock<std::mutex> lock(gate_mutex);
    main_thread = std::this_thread::get_id();
    results_unwanted = unwanted != 0;
    closed = true;
    emptied = gate_opens.wait_for(lock, std::chrono::duration<double>(seconds), [] { return n_inside == 0; });
  }
  Py_END_ALLOW_THREADS;
  return PyBool_FromLong(emptied);
}

PyMethodDef module_methods[] = {
    {"use_torch", UseTorch, METH_O, "Take torch's table of DLPack functions."},
    {"handler", Handler, METH_NOARGS, "The handler, as `jax.ffi.register_ffi_target` takes it."},
    {"close", Close, METH_VARARGS, "Let no call enter Python any more, and wait so many seconds for those inside."},
    {"number_of_calls", NumberOfCalls, METH_NOARGS, "How many calls there are."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "pytorch2jax._native", "XLA's calls of Python on torch tensors.", -1, module_methods,
};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  call_type.tp_name = "pytorch2jax._native.Call";
  call_type.tp_basicsize = sizeof(CallObject);
  call_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC;
  call_type.tp_doc = "A Python function that a compiled program calls by a number.";
  call_type.tp_new = CallNew;
  call_type.tp_dealloc = reinterpret_cast<destructor>(CallDealloc);
  call_type.tp_traverse = reinterpret_cast<traverseproc>(CallTraverse);
  call_type.tp_clear = reinterpret_cast<inquiry>(CallClear);
  call_type.tp_methods = call_methods;
  if (PyType_Ready(&call_type) < 0) return nullptr;
  Owned module(PyModule_Create(&module_definition));
  if (!module || PyModule_AddObjectRef(module.get(), "Call", reinterpret_cast<PyObject*>(&call_type)) < 0) return nullptr;
  return module.release();
}
