// Stands in for the CUDA backend where it is not built.
#include <tda/error.h>

#include "backend/backend.h"

namespace tda {

std::unique_ptr<Backend> make_cuda_backend(std::shared_ptr<const Model>) {
  throw DeviceError("device cuda: this version of tdaengine has no CUDA backend; use cpu or auto");
}

}  // namespace tda
