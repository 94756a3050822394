// Layer norm and RMS norm of rows, in float32 and, beside or instead of that, rounded.
#include <cmath>

#include "simd.h"

namespace {

// One row; its moments are made of the values, and then of their distances from the mean.
template <typename T>
void norm_row(const float* x, const float* weight, const float* bias, float* y, T* rounded,
              int64_t width, float epsilon) {
  Vector mean = splat(0.f);
  if (bias) {
    for (int64_t k = 0; k < width; k += LANES) mean += load(x + k);
    mean = splat(sum(mean) / static_cast<float>(width));
  }
  Vector squares = splat(0.f);
  for (int64_t k = 0; k < width; k += LANES) {
    const Vector centred = load(x + k) - mean;
    squares = multiply_add(centred, centred, squares);
  }
  const Vector scale = splat(1.f / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon));
  for (int64_t k = 0; k < width; k += LANES) {
    Vector value = (load(x + k) - mean) * scale * load(weight + k);
    if (bias) value += load(bias + k);
    if (y) store(y + k, value);
    if (rounded) store(rounded + k, value);
  }
}

template <typename T>
void norm(const float* x, const float* weight, const float* bias, float* y, T* rounded,
          int64_t rows, int64_t width, float epsilon, int threads) {
  const bool is_large = rows * width * 16 >= WORTH_THREADS;  // some 16 operations for each
#pragma omp parallel for num_threads(threads) if (is_large)
  for (int64_t row = 0; row < rows; row++) {
    const int64_t first = row * width;
    norm_row(x + first, weight, bias, y ? y + first : nullptr, rounded ? rounded + first : nullptr,
             width, epsilon);
  }
}

}  // namespace

extern "C" {

// Layer norm, or RMS norm where there is no bias, which takes no mean away either. Either output
// may be missing. Shapes: x, y and rounded (rows, width); the width is a multiple of LANES.
void norm_float32(const float* x, const float* weight, const float* bias, float* y, float* rounded,
                  int64_t rows, int64_t width, float epsilon, int threads) {
  norm(x, weight, bias, y, rounded, rows, width, epsilon, threads);
}

#ifdef __AVX512BF16__
void norm_bfloat16(const float* x, const float* weight, const float* bias, float* y,
                   bfloat16* rounded, int64_t rows, int64_t width, float epsilon, int threads) {
  norm(x, weight, bias, y, rounded, rows, width, epsilon, threads);
}
#endif
}
