// Vectors of floats, as wide as the CPU's registers, and what is made of their operations. Those
// with a sign of their own, such as +, are the compiler's.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "bfloat16.h"

#ifdef __AVX512F__
#include "avx512.h"
#else
#include "avx2.h"
#endif

// Multiply-adds from which on waking other threads pays: some ten microseconds of one.
constexpr int64_t WORTH_THREADS = 1 << 20;

// exp(x), to 2e-7 of it. NaN stays NaN; what is too small or too large becomes 0 or infinity.
// x = n ln 2 + r with an integer n; ln 2 in two parts, so that r is exact, and the minimax
// polynomial of Cephes' expf (S. L. Moshier) for exp(r) = 1 + r + r^2 p(r), |r| <= ln 2 / 2.
inline Vector exponential(Vector x) {
  x = smaller(splat(110.f), larger(splat(-110.f), x));  // with an infinite one there would be no n
  const Vector n = nearest_integer(x * splat(1.44269504f));
  Vector r = subtract_product(n, splat(0.693359375f), x);
  r = subtract_product(n, splat(-2.12194440e-4f), r);
  Vector p = splat(1.9875691500e-4f);
#pragma GCC unroll 5
  for (const float coefficient :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = multiply_add(p, r, splat(coefficient));
  p = multiply_add(p, r * r, r + splat(1.f));
  return times_power_of_two(p, n);
}

inline Vector sigmoid(Vector x) {
  const Vector one = splat(1.f);
  return one / (one + exponential(splat(0.f) - x));
}
