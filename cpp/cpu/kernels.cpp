// Small kernels, and the table of all. Compiled once per instruction set, like every kernels_*.cpp;
// TDA_ISA is its name.
#include "cpu/kernels.h"

#include "cpu/kernels_isa.h"
#include "cpu/simd.h"

#define TDA_TEXT(x) #x
#define TDA_NAME(x) TDA_TEXT(x)

namespace tda {
namespace {

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  Floats squares[4] = {};
  for (int64_t i = 0, turn = 0; i < n; i += kLanes, ++turn) {
    const Floats v = load_part<F32>(x + i, n - i);
    squares[turn % 4] += v * v;
  }
  const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / n;
  // A mean that overflows makes the scale NaN: 0 would hide it.
  const float scale = 1.0f / __builtin_sqrtf(mean + eps) + 0.0f * mean;
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void rotate(float* x, const float* cos, const float* sin, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float a = x[i], b = x[i + n];
    x[i] = a * cos[i] - b * sin[i];
    x[i + n] = b * cos[i] + a * sin[i];
  }
}

void gated(Activation activation, const float* gate, const float* up, float* h, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Floats g = load_part<F32>(gate + i, n - i), u = load_part<F32>(up + i, n - i);
    store_part(h + i, activate(activation, g) * u, n - i);
  }
}

void soft_cap(float cap, float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_part(x + i, soft_cap(load_part<F32>(x + i, n - i), cap), n - i);
}

std::uint64_t read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  Words total[4] = {};
  for (int64_t i = 0; i < bytes; i += 4 * kVectorBytes)
    for (int j = 0; j < 4; ++j) total[j] ^= load_as<Words>(p + i + j * kVectorBytes);
  total[0] ^= total[1] ^ total[2] ^ total[3];
  std::uint64_t result = 0;
  for (int i = 0; i < kLanes; ++i) result = result * 3 + total[0][i];
  return result;
}

}  // namespace

namespace TDA_ISA {

const Kernels& kernels() {
  using namespace TDA_DECODE_ISA;
  static const Kernels table = {TDA_NAME(TDA_ISA),
                                panel,
                                {f32_rows, bf16_rows, int8_rows, bf16c_rows},
                                {f32_panels, bf16_panels, int8_panels, bf16c_panels},
                                &bricks,
                                multiply_bricks,
                                {f32_cache, bf16_cache, int8_cache},
                                {f32_cache_panels, bf16_cache_panels, int8_cache_panels},
                                rms_norm,
                                rms_norm_panel,
                                rotate,
                                gated,
                                soft_cap,
                                softmax,
                                read};
  return table;
}

}  // namespace TDA_ISA
}  // namespace tda
