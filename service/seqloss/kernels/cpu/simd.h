// Sixteen floats at a time: AVX-512, and its bfloat16 extension where the CPU has it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

struct bfloat16 {
  uint16_t bits;
};

inline float as_float(float value) { return value; }

inline float as_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Multiply-adds from which on waking other threads pays: some ten microseconds of one.
constexpr int64_t WORTH_THREADS = 1 << 20;

using Vector = __m512;
constexpr int LANES = 16;

inline Vector splat(float value) { return _mm512_set1_ps(value); }

inline Vector load(const float* from) { return _mm512_loadu_ps(from); }

inline Vector load(const bfloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline void store(float* to, Vector values) { _mm512_storeu_ps(to, values); }

#ifdef __AVX512BF16__
inline void store(bfloat16* to, Vector values) {
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(values);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}
#endif

inline float sum(Vector values) { return _mm512_reduce_add_ps(values); }

// exp(x), to 2e-7 of it. NaN stays NaN; what is too small or too large becomes 0 or infinity.
// x = n ln 2 + r with an integer n; ln 2 in two parts, so that r is exact, and the minimax
// polynomial of Cephes' expf (S. L. Moshier) for exp(r) = 1 + r + r^2 p(r), |r| <= ln 2 / 2.
inline Vector exponential(Vector x) {
  x = _mm512_max_ps(splat(-110.f), x);  // with -infinity there would be no n
  const Vector n = _mm512_roundscale_ps(_mm512_mul_ps(x, splat(1.44269504f)), 8);
  Vector r = _mm512_fnmadd_ps(n, splat(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, splat(-2.12194440e-4f), r);
  Vector p = splat(1.9875691500e-4f);
#pragma GCC unroll 5
  for (const float coefficient :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, splat(coefficient));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, splat(1.f)));
  return _mm512_scalef_ps(p, n);
}

inline Vector sigmoid(Vector x) {
  const Vector one = splat(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(splat(0.f), x))));
}
