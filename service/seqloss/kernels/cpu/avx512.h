// Sixteen floats at a time: AVX-512, and its bfloat16 extension where the CPU has it.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "bfloat16.h"

using Vector = __m512;
constexpr int LANES = 16;

// Of sums in registers, of which there are 32: 24 for a tile of six rows.
constexpr int VECTORS = 4;

inline Vector splat(float value) { return _mm512_set1_ps(value); }

inline Vector load(const float* from) { return _mm512_loadu_ps(from); }

inline void store(float* to, Vector values) { _mm512_storeu_ps(to, values); }

inline Vector load(const bfloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

#ifdef __AVX512BF16__
inline void store(bfloat16* to, Vector values) {
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(values);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
}
#endif

// a b + c, rounded once.
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

// c - a b, rounded once.
inline Vector subtract_product(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }

// Both give the second number where either is none.
inline Vector larger(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector smaller(Vector a, Vector b) { return _mm512_min_ps(a, b); }

inline Vector magnitude(Vector x) { return _mm512_abs_ps(x); }

inline Vector nearest_integer(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_NO_EXC); }

// x 2^n for integers n.
inline Vector times_power_of_two(Vector x, Vector n) { return _mm512_scalef_ps(x, n); }

inline float sum(Vector values) { return _mm512_reduce_add_ps(values); }

inline float largest_of(Vector values) { return _mm512_reduce_max_ps(values); }

inline int num_positive(Vector values) {
  return __builtin_popcount(_mm512_cmp_ps_mask(values, splat(0.f), _CMP_GT_OQ));
}

// The first lanes, and `other` after them.
inline Vector first_lanes(Vector values, int64_t count, Vector other) {
  const __mmask16 kept = count < LANES ? (1 << count) - 1 : 0xffff;
  return _mm512_mask_mov_ps(other, kept, values);
}

// `other` in one lane, if there is a lane of that number.
inline Vector replace_lane(Vector values, int64_t lane, Vector other) {
  const bool is_here = lane >= 0 && lane < LANES;
  return _mm512_mask_mov_ps(values, is_here ? 1 << lane : 0, other);
}

// a0 b0 a1 b1 ... a15 b15.
inline void interleave(Vector a, Vector b, Vector (&both)[2]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  both[0] = _mm512_permutex2var_ps(a, low, b);
  both[1] = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
}
