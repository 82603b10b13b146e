// What the matrices of a model are, for people.
#pragma once

#include <tda/engine.h>

#include <vector>

#include "weights/model.h"

namespace tda {

std::vector<MatrixFormat> formats_of(const Model& model);

}  // namespace tda
