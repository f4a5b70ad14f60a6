// The Python module: what was compiled, which instruction set runs, how fast the machine is at best.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu_levels.h"
#include "huge_pages.h"

namespace py = pybind11;
using namespace cmx;

static std::vector<std::string> activations() {
#define X(name) #name,
  return {CMX_FOR_EACH_ACTIVATION(X)};
#undef X
}

static std::vector<std::string> dtypes() {
#define X(name) #name,
  return {CMX_FOR_EACH_DTYPE(X)};
#undef X
}

// FLOP/s of the calling thread on registers alone; float16 is multiplied in float32
static double peak(const std::string& dtype, double seconds) {
  if (dtype != "bfloat16" && dtype != "float32" && dtype != "float16")
    throw std::invalid_argument("dtype: got '" + dtype + "', wanted float32, float16 or bfloat16");
  const Dtype d = dtype == "bfloat16" ? Dtype::bfloat16 : Dtype::float32;
  const auto start = std::chrono::steady_clock::now();
  double flop = 0, passed = 0;
  while (passed < seconds) {
    flop += cpu_kernels().peak_flop(d, 1 << 16);
    passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return flop / passed;
}

// Some bytes of memory that its owner keeps, as they were. All are asked for before the first is read: behind a network,
// which has filled the caches, one after the other they take a hundred microseconds.
class Samples {
 public:
  explicit Samples(std::vector<std::pair<uintptr_t, size_t>> places) : places_(std::move(places)) {
    for (const auto& [address, size] : places_) was_.append((const char*)address, size);
  }
  bool unchanged() const {
    for (const auto& [address, size] : places_) __builtin_prefetch((const char*)address);
    const char* was = was_.data();
    for (const auto& [address, size] : places_) {
      if (memcmp((const char*)address, was, size) != 0) return false;
      was += size;
    }
    return true;
  }

 private:
  std::vector<std::pair<uintptr_t, size_t>> places_;
  std::string was_;
};

// What some Python objects were: their classes, and what their dictionaries held. In Python that takes a hundred
// microseconds behind a network, whose weights have filled the caches. Whoever holds it keeps those objects alive.
class Watch {
 public:
  using Entries = std::vector<std::tuple<py::handle, py::handle, py::handle>>;
  using Keys = std::vector<std::pair<py::handle, py::handle>>;
  using Sizes = std::vector<std::pair<py::handle, py::ssize_t>>;

  Watch(const std::vector<py::handle>& objects, const Entries& entries, const Keys& absent, const Sizes& sizes) {
    for (const py::handle object : objects) classes_.push_back({object.ptr(), Py_TYPE(object.ptr())});
    for (const auto& [dict, key, value] : entries) entries_.push_back({dict.ptr(), key.ptr(), value.ptr()});
    for (const auto& [dict, key] : absent) absent_.push_back({dict.ptr(), key.ptr()});
    for (const auto& [dict, size] : sizes) sizes_.push_back({dict.ptr(), size});
  }

  bool unchanged() const {
    for (const auto& [object, type] : classes_)
      if (Py_TYPE(object) != type) return false;
    for (const auto& [dict, size] : sizes_)
      if (PyDict_Size(dict) != size) return false;
    for (const auto& [dict, key, value] : entries_)
      if (!same(PyDict_GetItemWithError(dict, key), value)) return false;
    for (const auto& [dict, key] : absent_)
      if (PyDict_Contains(dict, key) != 0) return false;
    return true;
  }

 private:
  // Settings may be set again to what they were; tensors and modules have to be the same ones.
  static bool same(PyObject* found, PyObject* value) {
    if (found == value || !found) return found == value;
    const bool plain =
        PyTuple_CheckExact(value) || PyLong_Check(value) || PyFloat_CheckExact(value) || PyUnicode_CheckExact(value);
    if (!plain || Py_TYPE(found) != Py_TYPE(value)) return false;
    const int equal = PyObject_RichCompareBool(found, value, Py_EQ);
    if (equal < 0) PyErr_Clear();  // of what a tuple holds
    return equal == 1;
  }

  struct Class {
    PyObject* object;
    PyTypeObject* type;
  };
  struct Entry {
    PyObject *dict, *key, *value;
  };
  std::vector<Class> classes_;
  std::vector<Entry> entries_;
  std::vector<std::pair<PyObject*, PyObject*>> absent_;
  std::vector<std::pair<PyObject*, py::ssize_t>> sizes_;
};

// Where some Python objects and PyTorch's structures behind them lie in memory. Asked for together before they are read,
// they come at once instead of one after the other; a line whose owner is gone is asked for in vain.
class Lines {
 public:
  Lines(const py::list& objects, const std::vector<std::pair<uintptr_t, size_t>>& structures) {
    for (const auto& [address, size] : structures) add(address, size);
    for (const py::handle object : objects) {
      const bool is_dict = PyDict_Check(object.ptr());
      add((uintptr_t)object.ptr(), is_dict ? sizeof(PyDictObject) : Py_TYPE(object.ptr())->tp_basicsize);
      if (!is_dict) continue;
      const auto* dict = (const PyDictObject*)object.ptr();
      constexpr size_t kHeader = 64, kEntry = 3 * sizeof(PyObject*);
      if (dict->ma_values)  // an instance's; the keys are its class's
        add((uintptr_t)dict->ma_values, dict->ma_used * sizeof(PyObject*));
      else if (dict->ma_used)
        add((uintptr_t)dict->ma_keys, kHeader + dict->ma_used * kEntry);
    }
  }
  void fetch() const {
    for (const uintptr_t line : lines_) __builtin_prefetch((const char*)line);
  }

 private:
  void add(uintptr_t address, size_t size) {
    constexpr size_t kLine = 64;
    for (uintptr_t line = address / kLine * kLine; line < address + size; line += kLine) lines_.push_back(line);
  }
  std::vector<uintptr_t> lines_;
};

static std::map<std::string, double> stage_seconds() {
  std::map<std::string, double> found;
  auto add = [&](const char* name, int64_t nanoseconds) { found[name] += 1e-9 * nanoseconds; };
  if (const StageTimes* t = stage_times(Stage::Producer::patches)) {
    add("stem", t->producer);
    add("stem", t->product);
  }
  if (const StageTimes* t = stage_times(Stage::Producer::depthwise)) {
    add("depthwise", t->producer);
    add("pointwise", t->product);
  }
  return found;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of cmx_kernels";
  m.def("activations", activations, "activations with a CPU kernel");
  m.def("dtypes", dtypes, "storage types with a CPU kernel");
  m.def("isa_levels", cpu_levels, "instruction sets that were compiled and run here, slowest first");
  m.def("isa_level", [] { return std::string(cpu_kernels().name); }, "the instruction set in use");
  m.def(
      "set_isa_level", set_cpu_level, py::arg("name"),
      "use another instruction set, for tests: while no other thread is in a call; ValueError if it does not run here");
  m.def("strassen", strassen_allowed, "whether stacks of blocks may use Strassen's products in float32");
  m.def("allow_strassen", allow_strassen, py::arg("allowed"),
        "the same for weights that are packed from now on; like the above, while no other thread is in a call");
  m.def("time_stages", time_stages, py::arg("wanted"), "begin to count the time of the parts of a stack, or stop");
  m.def("stage_seconds", stage_seconds,
        "seconds of all workers since then in the stem, depthwise and pointwise halves");
  py::class_<Lines>(m, "Lines", "memory of Python objects, and structures at (address, bytes)")
      .def(py::init<const py::list&, const std::vector<std::pair<uintptr_t, size_t>>&>(), py::arg("objects"),
           py::arg("structures"))
      .def("fetch", &Lines::fetch, "ask for all of it, without waiting");
  py::class_<Watch>(m, "Watch", "the classes of objects, and what dictionaries held; see models/stack.py")
      .def(py::init<const std::vector<py::handle>&, const Watch::Entries&, const Watch::Keys&, const Watch::Sizes&>(),
           py::arg("objects"), py::arg("entries"), py::arg("absent"), py::arg("sizes"))
      .def("unchanged", &Watch::unchanged);
  py::class_<Samples>(m, "Samples", "Bytes at addresses, as they were; whoever holds it keeps that memory alive")
      .def(py::init<std::vector<std::pair<uintptr_t, size_t>>>(), py::arg("places"), "pairs (address, bytes)")
      .def("unchanged", &Samples::unchanged);
  m.def("release_memory", release_memory, "give free memory of training back to the system at once");
  m.attr("huge_page") = kHugePage;
  m.def(
      "use_huge_pages", [](uintptr_t address, int64_t bytes) { use_huge_pages((void*)address, bytes); },
      py::arg("address"), py::arg("bytes"),
      "ask the system for huge pages; from a multiple of huge_page on, before the memory is written");
  m.def("lanes", [] { return cpu_kernels().lanes; }, "channels in a vector");
  m.def("peak", peak, py::arg("dtype"), py::arg("seconds") = 0.02, py::call_guard<py::gil_scoped_release>(),
        "FLOP/s of one thread on registers alone, \"float32\", \"float16\" or \"bfloat16\"; run it on every core at "
        "once");
}
