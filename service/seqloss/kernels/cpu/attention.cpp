// Attention of sequences that stand one after the other, without padding, in float32.
//
// softmax(scale Q K^T + bias) V for each sequence and head: keys are laid out as a panel, values
// are one nearly as they are, and both products are those of a linear layer.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <vector>

#include "outcome.h"
#include "products.h"

namespace {

// Transposes LANES x LANES floats: halves are shuffled like a deck of cards until all are in order.
inline void transpose(Vector (&rows)[LANES]) {
  for (int places = 1; places < LANES; places *= 2) {
    Vector shuffled[LANES / 2][2];
    for (int i = 0; i < LANES / 2; i++) interleave(rows[i], rows[i + LANES / 2], shuffled[i]);
    std::memcpy(rows, shuffled, sizeof shuffled);
  }
}

// Lays keys out as panels, one after the other.
void pack_keys(const float* keys, int64_t stride, int64_t num_keys, int64_t width, float* panels) {
  for (int64_t first = 0; first < num_keys; first += LANES) {
    float* to = panels + first / WIDTH * WIDTH * width + first % WIDTH;
    for (int64_t k = 0; k < width; k += LANES) {
      Vector rows[LANES] = {};
      for (int64_t i = 0; i < std::min<int64_t>(LANES, num_keys - first); i++)
        rows[i] = load(keys + (first + i) * stride + k);
      transpose(rows);
      for (int64_t i = 0; i < LANES; i++) store(to + (k + i) * WIDTH, rows[i]);
    }
  }
}

// And values, of which a panel has a part of their columns.
void pack_values(const float* values, int64_t stride, int64_t num_keys, int64_t width,
                 float* panels) {
  for (int64_t k = 0; k < num_keys; k++)
    for (int64_t i = 0; i < width; i += LANES)
      store(panels + i / WIDTH * WIDTH * num_keys + k * WIDTH + i % WIDTH,
            load(values + k * stride + i));
}

template <typename T>
struct Arguments {
  const float *queries, *keys, *values;
  T* attended;
  int64_t query_stride, key_stride, value_stride;
  const int64_t *query_starts, *query_ends, *key_starts, *key_ends;
  const float* bias;
  int64_t bias_reach;
  int64_t heads, width;
  float scale;
  bool causal;
};

// What a thread needs for one sequence and head; it grows with the longest that it has seen.
struct Scratch {
  std::vector<float> keys, values, scores, bias;
};

// The bias of a query for all keys is a part of one that has an entry for each distance.
inline void spread_bias(const float* bias, int64_t reach, int64_t queries, int64_t keys,
                        std::vector<float>& spread) {
  spread.resize(queries + keys + WIDTH);
  for (int64_t i = 0; i < queries + keys; i++)
    spread[i] = bias[std::clamp(i - (queries - 1), -reach, reach) + reach];
}

// Makes exp(score - largest) of a query's scores, and returns one over their sum.
inline float softmax(float* scores, const float* bias, float scale, int64_t num_keys) {
  const Vector least = splat(-INFINITY);
  Vector largest = least;
  for (int64_t k = 0; k < num_keys; k += LANES) {
    Vector score = load(scores + k) * splat(scale);
    if (bias) score += load(bias + k);
    score = first_lanes(score, num_keys - k, least);
    store(scores + k, score);
    largest = larger(largest, score);
  }
  largest = splat(largest_of(largest));
  Vector total = splat(0.f);
  for (int64_t k = 0; k < num_keys; k += LANES) {
    const Vector exp = exponential(load(scores + k) - largest);
    store(scores + k, exp);
    total += exp;
  }
  return 1.f / sum(total);
}

// Attends from `rows` queries, the first of which is number `first` of its sequence.
template <typename T>
void attend_rows(const Arguments<T>& with, const float* queries, T* attended, int64_t first,
                 int64_t rows, int64_t num_queries, int64_t num_keys, Scratch& scratch) {
  const int64_t width = with.width, stride = num_panels(num_keys) * WIDTH;
  const int64_t seen = with.causal ? std::min(num_keys, first + rows) : num_keys;
  Tile tile;
  for (int64_t column = 0; column < seen; column += WIDTH) {
    multiply(queries, with.query_stride, rows, scratch.keys.data() + column * width, seen - column,
             width, tile);
    for (int64_t i = 0; i < rows; i++)
      std::copy_n(tile.row[i], WIDTH, scratch.scores.data() + i * stride + column);
  }
  float scales[ROWS];
  for (int64_t i = 0; i < rows; i++) {
    float* scores = scratch.scores.data() + i * stride;
    const int64_t query = first + i, own = with.causal ? std::min(num_keys, query + 1) : num_keys;
    const float* bias = with.bias ? scratch.bias.data() + num_queries - 1 - query : nullptr;
    scales[i] = softmax(scores, bias, with.scale, own);
    std::fill(scores + own, scores + seen, 0.f);
  }
  for (int64_t column = 0; column < width; column += WIDTH) {
    multiply(scratch.scores.data(), stride, rows, scratch.values.data() + column * num_keys,
             width - column, seen, tile);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < std::min<int64_t>(WIDTH, width - column); j += LANES)
        store(attended + i * with.heads * width + column + j,
              load(tile.row[i] + j) * splat(scales[i]));
  }
}

template <typename T>
void attend(const Arguments<T>& with, int64_t sequence, int64_t head, Scratch& scratch) {
  const int64_t width = with.width, column = head * width;
  const int64_t query = with.query_starts[sequence], key = with.key_starts[sequence];
  const int64_t num_queries = with.query_ends[sequence] - query;
  const int64_t num_keys = with.key_ends[sequence] - key;
  const int64_t padded = num_panels(num_keys) * WIDTH;

  scratch.keys.resize(padded * width);
  pack_keys(with.keys + key * with.key_stride + column, with.key_stride, num_keys, width,
            scratch.keys.data());
  scratch.values.resize(num_panels(width) * WIDTH * num_keys);
  pack_values(with.values + key * with.value_stride + column, with.value_stride, num_keys, width,
              scratch.values.data());
  if (with.bias)
    spread_bias(with.bias + head * (2 * with.bias_reach + 1), with.bias_reach, num_queries,
                num_keys, scratch.bias);
  scratch.scores.resize(ROWS * padded);

  for (int64_t row = 0; row < num_queries; row += ROWS)
    attend_rows(with, with.queries + (query + row) * with.query_stride + column,
                with.attended + (query + row) * with.heads * width + column, row,
                std::min<int64_t>(ROWS, num_queries - row), num_queries, num_keys, scratch);
}

// Whether each query is in one sequence, and all keys that sequences name are there.
template <typename T>
bool are_inside(const Arguments<T>& with, int64_t num_sequences, int64_t queries, int64_t keys) {
  int64_t query = 0;
  for (int64_t i = 0; i < num_sequences; i++) {
    if (with.query_starts[i] != query || with.query_ends[i] < query || with.key_starts[i] < 0 ||
        with.key_starts[i] >= with.key_ends[i] || with.key_ends[i] > keys)
      return false;
    query = with.query_ends[i];
  }
  return query == queries;
}

template <typename T>
Outcome attention(const Arguments<T>& with, int64_t num_sequences, int threads) {
  double pairs = 0;  // of a query and a key; a product of theirs may be beyond an integer
  for (int64_t i = 0; i < num_sequences; i++)
    pairs += static_cast<double>(with.query_ends[i] - with.query_starts[i]) *
             static_cast<double>(with.key_ends[i] - with.key_starts[i]);
  const bool is_large = 2 * pairs * with.heads * with.width >= WORTH_THREADS;
  std::atomic<bool> has_memory = true;
#pragma omp parallel num_threads(threads) if (is_large)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < num_sequences * with.heads; task++) {
      if (!has_memory) continue;
      try {
        attend(with, task / with.heads, task % with.heads, scratch);
      } catch (const std::exception&) {  // of vectors: too little memory, or more than there can be
        has_memory = false;
      }
    }
  }
  return has_memory ? DONE : NO_MEMORY;
}

}  // namespace

#define ATTENTION(NAME, T)                                                                        \
  int NAME(const float* queries, const float* keys, const float* values, T* attended,             \
           int64_t query_stride, int64_t key_stride, int64_t value_stride,                        \
           const int64_t* query_starts, const int64_t* query_ends, const int64_t* key_starts,     \
           const int64_t* key_ends, const float* bias, int64_t bias_reach, int64_t num_sequences, \
           int64_t num_queries, int64_t num_keys, int64_t heads, int64_t width, float scale,      \
           int causal, int threads) {                                                             \
    const Arguments<T> with{queries,    keys,         values,       attended,   query_stride,     \
                            key_stride, value_stride, query_starts, query_ends, key_starts,       \
                            key_ends,   bias,         bias_reach,   heads,      width,            \
                            scale,      causal != 0};                                             \
    if (!are_inside(with, num_sequences, num_queries, num_keys)) return WRONG_ROWS;               \
    return attention(with, num_sequences, threads);                                               \
  }

extern "C" {

// Queries of sequence i stand in the rows query_starts[i] to query_ends[i], where the next ones
// start, its keys and values in the rows key_starts[i] to key_ends[i]. With `causal`, query q sees
// keys 0 to q. The bias depends on how far a key is from its query, up to bias_reach; beyond, it
// stays the same. Shapes: attended (num_queries, heads * width), float32 or rounded, bias (heads,
// 2 * bias_reach + 1) or missing; the width of a head is a multiple of LANES. Strides are between
// rows, in elements. Returns an Outcome.
ATTENTION(attention_float32, float)
#ifdef __AVX512BF16__
ATTENTION(attention_bfloat16, bfloat16)
#endif
}
