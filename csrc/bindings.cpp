// The native module: the instruction set's level, and the functions of every op, which their own
// bindings give it (common/bindings.h).
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "common/bindings.h"
#include "common/cpu.h"
#include "common/parallel.h"

std::vector<Bind>& every_bind() {
  static std::vector<Bind> all;
  return all;
}

namespace {

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (int level = 0; level <= int(best_isa()); ++level) names.push_back(kIsaNames[level]);
  return names;
}

// `emulated`: take AMX on a machine without it, whose instructions an emulator then catches.
void set_isa(const std::string& name, bool emulated) {
  if (emulated && name == kIsaNames[int(Isa::kAmx)] && best_isa() >= Isa::kAvx512Bf16)
    return set_current_isa(Isa::kAmx);
  for (int level = 0; level <= int(best_isa()); ++level)
    if (name == kIsaNames[level]) return set_current_isa(Isa(level));
  throw py::value_error("set_isa: this machine has no instruction set level '" + name + "'");
}

// A misspelt GRADSMITH_ISA would be a measurement of another machine than the one that was meant.
void refuse_unknown_isa() {
  const char* const name = std::getenv("GRADSMITH_ISA");
  if (!name) return;
  std::string known;
  for (const char* level : kIsaNames) {
    if (!std::strcmp(name, level)) return;
    known += std::string(known.empty() ? "" : ", ") + level;
  }
  throw py::import_error("GRADSMITH_ISA is '" + std::string(name) + "'; it may be one of " + known);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("__doc__") = "gradsmith's C++ kernels; called by the cpu backend of each op.";

  refuse_unknown_isa();
  m.def("isa_levels", isa_levels, "Instruction set levels that this machine runs, best last.");
  m.def("isa", [] { return std::string(kIsaNames[int(current_isa())]); }, "The level in use.");
  m.def("set_isa", set_isa, py::arg("name"), py::arg("emulated") = false,
        "Use another level (for tests).");
  m.def("parallel_runtime", parallel_runtime, "Where the threads come from.");
  for (const Bind bind : every_bind()) bind(m);
}
