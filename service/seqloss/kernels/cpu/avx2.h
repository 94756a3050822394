// Eight floats at a time: AVX2 with fused multiply-adds.
#pragma once

#include <immintrin.h>

#include <cstdint>

using Vector = __m256;
constexpr int LANES = 8;

// Of sums in registers, of which there are 16: 12 for a tile of six rows.
constexpr int VECTORS = 2;

inline Vector splat(float value) { return _mm256_set1_ps(value); }

inline Vector load(const float* from) { return _mm256_loadu_ps(from); }

inline void store(float* to, Vector values) { _mm256_storeu_ps(to, values); }

// a b + c, rounded once.
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

// c - a b, rounded once.
inline Vector subtract_product(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }

// Both give the second number where either is none.
inline Vector larger(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector smaller(Vector a, Vector b) { return _mm256_min_ps(a, b); }

inline Vector magnitude(Vector x) { return _mm256_andnot_ps(splat(-0.f), x); }

inline Vector nearest_integer(Vector x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline Vector power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// x 2^n for integers n from -252 to 254. By two factors, since one would not reach the subnormal
// numbers; the first product is exact where 1/2 <= |x| <= 2, so that only the second is rounded.
inline Vector times_power_of_two(Vector x, Vector n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return x * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
}

inline __m128 lower(Vector values) { return _mm256_castps256_ps128(values); }
inline __m128 upper(Vector values) { return _mm256_extractf128_ps(values, 1); }

inline float sum(Vector values) {
  const __m128 four = lower(values) + upper(values);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
}

inline float largest_of(Vector values) {
  const __m128 four = _mm_max_ps(lower(values), upper(values));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline int num_positive(Vector values) {
  return __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(values, splat(0.f), _CMP_GT_OQ)));
}

inline __m256i lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }

// The first lanes, and `other` after them.
inline Vector first_lanes(Vector values, int64_t count, Vector other) {
  const int end = count < LANES ? static_cast<int>(count) : LANES;
  const __m256i kept = _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane_numbers());
  return _mm256_blendv_ps(other, values, _mm256_castsi256_ps(kept));
}

// `other` in one lane, if there is a lane of that number.
inline Vector replace_lane(Vector values, int64_t lane, Vector other) {
  const int number = lane >= 0 && lane < LANES ? static_cast<int>(lane) : -1;
  const __m256i is_here = _mm256_cmpeq_epi32(_mm256_set1_epi32(number), lane_numbers());
  return _mm256_blendv_ps(values, other, _mm256_castsi256_ps(is_here));
}

// a0 b0 a1 b1 ... a7 b7.
inline void interleave(Vector a, Vector b, Vector (&both)[2]) {
  const Vector even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  both[0] = _mm256_permute2f128_ps(even, odd, 0x20);
  both[1] = _mm256_permute2f128_ps(even, odd, 0x31);
}
