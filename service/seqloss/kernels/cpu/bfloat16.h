// The upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

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
