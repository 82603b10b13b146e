// The parts of _native, a source file each.
#pragma once

#include <nanobind/nanobind.h>

void bind_config(nanobind::module_& m);   // ModelConfig and its parts
void bind_options(nanobind::module_& m);  // options of calls, Thresholds
void bind_engine(nanobind::module_& m);   // Engine, and functions beside it
void bind_gguf(nanobind::module_& m);     // GgufModel
