// Linear layers: y = activation(x W^T + b), or residual + x W^T + b in float32.
#include <algorithm>

#include "products.h"

namespace {

// Rows that share a panel while it is in the cache; a multiple of a tile's.
constexpr int64_t ROWS_AT_ONCE = 40 * ROWS;
// Of the cache.
constexpr int64_t FLOATS_PER_LINE = 16;

enum Activation : int { NONE, RELU, SILU, GELU, GELU_TANH };

// x Phi(x), with erf by formula 7.1.26 of Abramowitz and Stegun: to 1.5e-7.
inline Vector gelu(Vector x) {
  const Vector z = magnitude(x * splat(0.70710678f));
  const Vector one = splat(1.f);
  const Vector t = one / multiply_add(splat(0.3275911f), z, one);
  Vector p = splat(1.061405429f);
  for (const float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    p = multiply_add(p, t, splat(coefficient));
  const Vector erf = one - p * t * exponential(subtract_product(z, z, splat(0.f)));
  const Vector half = x * splat(0.5f);
  // erf is odd: x erf(x / sqrt 2) = |x| erf(z).
  return multiply_add(magnitude(half), erf, half);
}

// 1/2 x (1 + tanh u) = x sigmoid(2u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vector gelu_tanh(Vector x) {
  const Vector scale = multiply_add(x * x, splat(0.0713548163f), splat(1.5957691216f));
  return x * sigmoid(x * scale);
}

inline Vector activated(Vector x, int activation) {
  switch (activation) {
    case RELU:
      return larger(splat(0.f), x);
    case SILU:
      return x * sigmoid(x);
    case GELU:
      return gelu(x);
    case GELU_TANH:
      return gelu_tanh(x);
    default:
      return x;
  }
}

// Rows of the product, or of its sum with a residual, at one panel's columns.
template <typename T>
struct Output {
  T* rounded;   // or
  float* wide;  // where there is a residual, or no rounding is asked for
  const float* residual;
  const float* bias;
  int64_t stride;
  int activation;

  Output at(int64_t row, int64_t column) const {
    const int64_t offset = row * stride + column;
    return {rounded ? rounded + offset : nullptr,
            wide + offset,
            residual ? residual + offset : nullptr,
            bias + column,
            stride,
            activation};
  }

  // What is in no cache yet is there when the products are done.
  void prefetch(int64_t rows) const {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t column = 0; column < WIDTH; column += FLOATS_PER_LINE) {
        _mm_prefetch(residual + i * stride + column, _MM_HINT_T0);
        __builtin_prefetch(wide + i * stride + column, 1);
      }
  }

  void write(const Tile& tile, int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < rows; i++)
      for (int64_t column = 0; column < columns; column += LANES) {
        const int64_t offset = i * stride + column;
        const Vector value = load(tile.row[i] + column) + load(bias + column);
        if (residual)
          store(wide + offset, value + load(residual + offset));
        else if (rounded)
          store(rounded + offset, activated(value, activation));
        else
          store(wide + offset, activated(value, activation));
      }
  }
};

template <typename T>
void linear(const T* x, const T* panels, const float* bias, const float* residual, T* rounded,
            float* wide, int64_t rows, int64_t inner, int64_t columns, int activation,
            int threads) {
  const Output<T> output{rounded, wide, residual, bias, columns, activation};
  const int64_t blocks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  const bool is_large = rows * inner * columns >= WORTH_THREADS;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (is_large)
  for (int64_t task = 0; task < blocks * num_panels(columns); task++) {
    const int64_t first = task / num_panels(columns) * ROWS_AT_ONCE;
    const int64_t column = task % num_panels(columns) * WIDTH;
    const int64_t width = std::min<int64_t>(WIDTH, columns - column);
    for (int64_t row = first; row < std::min(rows, first + ROWS_AT_ONCE); row += ROWS) {
      const int64_t height = std::min<int64_t>(ROWS, rows - row);
      const Output<T> there = output.at(row, column);
      if (residual) there.prefetch(height);
      Tile tile;
      multiply(x + row * inner, inner, height, panels + column * inner, WIDTH, inner, tile);
      there.write(tile, height, width);
    }
  }
}

}  // namespace

extern "C" {

int lanes() { return LANES; }

int panel_width() { return WIDTH; }

// Makes panels of a weight. Shapes: (rows, inner) to (panels, inner, WIDTH), zeros after the rows.
void pack_float32(const float* weight, float* panels, int64_t rows, int64_t inner, int threads) {
  pack(weight, panels, rows, inner, threads);
}

#ifdef __AVX512BF16__
void pack_bfloat16(const bfloat16* weight, bfloat16* panels, int64_t rows, int64_t inner,
                   int threads) {
  pack(weight, panels, rows, inner, threads);
}
#endif

// activation(x W^T + bias), rounded to the dtype of x or wide, whichever output there is; or, where
// there is a residual, residual + x W^T + bias, wide. Shapes: x (rows, inner), bias
// (panels * WIDTH), outputs (rows, columns). Columns are a multiple of LANES, and an inner size of
// bfloat16 is even.
void linear_float32(const float* x, const float* panels, const float* bias, const float* residual,
                    float* rounded, float* wide, int64_t rows, int64_t inner, int64_t columns,
                    int activation, int threads) {
  linear(x, panels, bias, residual, rounded, wide, rows, inner, columns, activation, threads);
}

#ifdef __AVX512BF16__
void linear_bfloat16(const bfloat16* x, const bfloat16* panels, const float* bias,
                     const float* residual, bfloat16* rounded, float* wide, int64_t rows,
                     int64_t inner, int64_t columns, int activation, int threads) {
  linear(x, panels, bias, residual, rounded, wide, rows, inner, columns, activation, threads);
}
#endif
}
