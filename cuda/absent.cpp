// Compiled instead of the CUDA backend in builds without CUDA.
#include <tda/error.h>

#include "backend/backend.h"

namespace tda {

std::string cuda_missing() { return "this build of tdaengine has no CUDA backend"; }

std::unique_ptr<Backend> make_cuda_backend(std::shared_ptr<const Model>, int) {
  throw DeviceError("device cuda: " + cuda_missing() + "; use cpu or auto");
}

}  // namespace tda
