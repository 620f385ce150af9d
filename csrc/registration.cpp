// The schemas of the library's compiled operators, and the Python module whose import registers them and which tells
// what was built.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "cpu_lanes.h"

#define LAMBDA_KERNELS_TEXT_OF(...) #__VA_ARGS__
#define LAMBDA_KERNELS_TEXT(...) LAMBDA_KERNELS_TEXT_OF(__VA_ARGS__)

#if defined(__clang__)
#define LAMBDA_KERNELS_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define LAMBDA_KERNELS_COMPILER "gcc " __VERSION__
#elif defined(_MSC_VER)
#define LAMBDA_KERNELS_COMPILER "msvc " LAMBDA_KERNELS_TEXT(_MSC_VER)
#else
#define LAMBDA_KERNELS_COMPILER "unknown"
#endif

// A fragment, because the operators written in Python live in the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(lambda_kernels, library) {
  library.def(
      "histogram(Tensor[] x, Tensor? grid, int bins, int per, bool statistics, Tensor? only)"
      " -> (Tensor counts, Tensor outside, Tensor moments)");
}

namespace {

// The vector instructions that the CPU code uses here; None if LAMBDA_KERNELS_CPU_CAPABILITY names others.
PyObject* cpu_capability(PyObject*, PyObject*) {
  const lambda_kernels::Lanes* const lanes = lambda_kernels::lanes_here();
  if (lanes == nullptr) {
    Py_RETURN_NONE;
  }
  return PyUnicode_FromString(lanes->name);
}

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {{"cpu_capability", cpu_capability, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C",    nullptr, -1, methods,
                                   nullptr,               nullptr, nullptr, nullptr};
  static const char* const constants[][2] = {
      {"COMPILER", LAMBDA_KERNELS_COMPILER},
      {"CUDA", LAMBDA_KERNELS_TEXT(LAMBDA_KERNELS_CUDA)},
      {"CUDA_ARCHITECTURES", LAMBDA_KERNELS_TEXT(LAMBDA_KERNELS_CUDA_ARCHITECTURES)},
      {"TORCH", LAMBDA_KERNELS_TEXT(LAMBDA_KERNELS_TORCH)},
      {"SOURCES", LAMBDA_KERNELS_TEXT(LAMBDA_KERNELS_SOURCES)},
  };
  PyObject* const module = PyModule_Create(&definition);
  for (const auto& constant : constants) {
    if (module != nullptr && PyModule_AddStringConstant(module, constant[0], constant[1]) != 0) {
      Py_DECREF(module);
      return nullptr;
    }
  }
  return module;
}
