// Products of rows with a weight that is laid out in panels.
//
// A panel holds WIDTH rows of the weight, which are columns of the product, such that one step of
// the inner loop reads it in order: a float of each row, or two neighbouring bfloat16, which one
// instruction multiplies and sums up. A tile of ROWS x WIDTH sums fills three registers of four.
//
// Every sum is made of the same products in the same order, whichever tile computes it: a row's
// result depends on no other row.
#pragma once

#include "simd.h"

constexpr int ROWS = 6;
constexpr int WIDTH = VECTORS * LANES;

// How many neighbours of a row stand together in a panel.
template <typename T>
constexpr int NEIGHBOURS = sizeof(float) / sizeof(T);

inline int64_t num_panels(int64_t columns) { return (columns + WIDTH - 1) / WIDTH; }

// A tile of a product, on its way through the cache.
struct alignas(64) Tile {
  float row[ROWS][WIDTH];
};

template <int R, int V>
inline void add_products(const float* rows, int64_t stride, const float* panel, int64_t inner,
                         Vector (&sums)[R][V]) {
  for (int64_t k = 0; k < inner; k++, panel += WIDTH) {
    Vector weights[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) weights[j] = load(panel + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < R; i++) {
      const Vector value = splat(rows[i * stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[i][j] = multiply_add(value, weights[j], sums[i][j]);
    }
  }
}

#ifdef __AVX512BF16__
template <int R, int V>
inline void add_products(const bfloat16* rows, int64_t stride, const bfloat16* panel, int64_t inner,
                         Vector (&sums)[R][V]) {
  for (int64_t k = 0; k < inner; k += 2, panel += 2 * WIDTH) {
    __m512bh weights[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; j++) weights[j] = (__m512bh)_mm512_loadu_si512(panel + j * 2 * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < R; i++) {
      int32_t neighbours;
      std::memcpy(&neighbours, rows + i * stride + k, sizeof neighbours);
      const __m512bh values = (__m512bh)_mm512_set1_epi32(neighbours);
#pragma GCC unroll 4
      for (int j = 0; j < V; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], values, weights[j]);
    }
  }
}
#endif

// Never inlined: the constants of whatever follows would take registers from the sums, which cost
// a third of the speed.
template <typename T, int R, int V>
[[gnu::noinline]] void multiply_tile(const T* rows, int64_t stride, const T* panel, int64_t inner,
                                     Tile& tile) {
  Vector sums[R][V] = {};
  add_products(rows, stride, panel, inner, sums);
  for (int i = 0; i < R; i++)
    for (int j = 0; j < V; j++) store(tile.row[i] + j * LANES, sums[i][j]);
}

// Calls `function` with a number of 1 to N as a constant.
template <int N, typename Function>
inline void with_constant(int64_t number, Function&& function) {
  if (number >= N)
    function.template operator()<N>();
  else if constexpr (N > 1)
    with_constant<N - 1>(number, function);
}

// A tile of the product of rows, the most of which are ROWS, and a panel, the most of whose columns
// are WIDTH.
template <typename T>
void multiply(const T* rows, int64_t stride, int64_t num_rows, const T* panel, int64_t num_columns,
              int64_t inner, Tile& tile) {
  with_constant<ROWS>(num_rows, [&]<int R>() {
    with_constant<VECTORS>((num_columns + LANES - 1) / LANES, [&]<int V>() {
      multiply_tile<T, R, V>(rows, stride, panel, inner, tile);
    });
  });
}

template <typename T>
void pack(const T* weight, T* panels, int64_t rows, int64_t inner, int threads) {
  constexpr int N = NEIGHBOURS<T>;
#pragma omp parallel for num_threads(threads)
  for (int64_t panel = 0; panel < num_panels(rows); panel++)
    for (int64_t k = 0; k < inner; k += N)
      for (int column = 0; column < WIDTH; column++) {
        const int64_t row = panel * WIDTH + column;
        T* to = panels + panel * WIDTH * inner + k * WIDTH + column * N;
        for (int n = 0; n < N; n++) to[n] = row < rows ? weight[row * inner + k + n] : T{};
      }
}
