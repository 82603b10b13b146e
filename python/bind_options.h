// The part of _native that is plain records: what a model is and what to do with it.
#pragma once

#include <nanobind/nanobind.h>

void bind_config(nanobind::module_& m);   // ModelConfig and its parts
void bind_options(nanobind::module_& m);  // options of calls, Thresholds
