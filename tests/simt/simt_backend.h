// The whole CUDA backend, host code and kernels, as plain C++ (see simt.h).
#pragma once

#include "cuda/attention.cu"
#include "cuda/cublas.cu"
#include "cuda/cuda_backend.cu"
#include "cuda/ffn.cu"
#include "cuda/linear.cu"
#include "cuda/masks.cu"
#include "naive.h"
