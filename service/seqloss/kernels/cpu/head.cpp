// The loss head: sums over the classes of a softmax, whose logits never leave the registers.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "outcome.h"
#include "products.h"

namespace {

constexpr int64_t ROWS_AT_ONCE = 40 * ROWS;
constexpr int64_t PANELS_AT_ONCE = 1024 / WIDTH;
// exp of it is 0.
constexpr float LEAST = -110.f;
// What the label's own d is replaced by.
constexpr float LOWEST = std::numeric_limits<float>::lowest();

// Of each token, over the classes but its label, with d = z - z_label.
struct Outputs {
  float* nlls;       // log(1 + sum exp(d))
  double* totals;    // sum exp(d); missing, as those that follow, where only nlls are wanted
  double* weighted;  // sum exp(d) d
  int32_t* ranks;    // how many d are greater than 0
  float* leads;      // the largest d
};

// One token's sums over a part of the vocabulary, by lane.
template <bool ALL>
struct Lanes {
  Vector total;
};

template <>
struct Lanes<true> {
  Vector total, weighted, lead = splat(LOWEST);
  int32_t rank;
};

struct PartSums {
  float total, weighted, lead;
  int32_t rank;
};

// d = z - z_label of one token and a panel's classes: adds exp(d), exp(d) d, and how many are
// greater than 0, and keeps the largest. The label is none of them where it is not from 0 to WIDTH.
template <bool ALL>
inline void add(const float* products, const float* bias, float label_logit, int64_t label,
                Lanes<ALL>& lanes) {
  const Vector least = splat(LEAST);
  Vector total = lanes.total;
  for (int j = 0; j < VECTORS; j++) {
    const Vector logits = load(products + j * LANES) + load(bias + j * LANES);
    const Vector distance =
        replace_lane(logits - splat(label_logit), label - j * LANES, splat(LOWEST));
    const Vector exp = exponential(distance);
    total += exp;
    if constexpr (ALL) {
      lanes.weighted = multiply_add(exp, larger(least, distance), lanes.weighted);
      lanes.lead = larger(distance, lanes.lead);
      lanes.rank += num_positive(distance);
    }
  }
  lanes.total = total;
}

template <typename T, bool ALL>
void head(const T* hidden, const float* label_logits, const int64_t* labels, const T* panels,
          const float* bias, int64_t tokens, int64_t inner, int64_t panels_count, Outputs outputs,
          int threads) {
  const int64_t parts = (panels_count + PANELS_AT_ONCE - 1) / PANELS_AT_ONCE;
  const int64_t blocks = (tokens + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  std::vector<PartSums> sums(parts * tokens);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < parts * blocks; task++) {
    const int64_t part = task / blocks, first = task % blocks * ROWS_AT_ONCE;
    const int64_t end = std::min(tokens, first + ROWS_AT_ONCE);
    Lanes<ALL> lanes[ROWS_AT_ONCE] = {};
    for (int64_t panel = part * PANELS_AT_ONCE;
         panel < std::min(panels_count, (part + 1) * PANELS_AT_ONCE); panel++)
      for (int64_t row = first; row < end; row += ROWS) {
        Tile products;
        const int64_t rows = std::min<int64_t>(ROWS, end - row);
        multiply(hidden + row * inner, inner, rows, panels + panel * WIDTH * inner, WIDTH, inner,
                 products);
        for (int64_t i = 0; i < rows; i++)
          add<ALL>(products.row[i], bias + panel * WIDTH, label_logits[row + i],
                   labels[row + i] - panel * WIDTH, lanes[row + i - first]);
      }
    for (int64_t row = first; row < end; row++) {
      const Lanes<ALL>& own = lanes[row - first];
      PartSums& there = sums[part * tokens + row];
      there.total = sum(own.total);
      if constexpr (ALL) {
        there.weighted = sum(own.weighted);
        there.lead = largest_of(own.lead);
        there.rank = own.rank;
      }
    }
  }
  // In the order of the vocabulary, whoever computed which part of it.
  const bool is_large = tokens * parts * 16 >= WORTH_THREADS;
#pragma omp parallel for num_threads(threads) if (is_large)
  for (int64_t token = 0; token < tokens; token++) {
    double total = 0, weighted = 0;
    float lead = LOWEST;
    int32_t rank = 0;
    for (int64_t part = 0; part < parts; part++) {
      const PartSums& own = sums[part * tokens + token];
      total += own.total;
      weighted += own.weighted;
      lead = std::max(lead, own.lead);
      rank += own.rank;
    }
    outputs.nlls[token] = static_cast<float>(std::log1p(total));
    if constexpr (ALL) {
      outputs.totals[token] = total;
      outputs.weighted[token] = weighted;
      outputs.ranks[token] = rank;
      outputs.leads[token] = lead;
    }
  }
}

template <typename T>
Outcome head(const T* hidden, const float* label_logits, const int64_t* labels, const T* panels,
             const float* bias, const Outputs& outputs, int64_t tokens, int64_t inner,
             int64_t panels_count, int threads) {
  try {
    if (outputs.totals)
      head<T, true>(hidden, label_logits, labels, panels, bias, tokens, inner, panels_count,
                    outputs, threads);
    else
      head<T, false>(hidden, label_logits, labels, panels, bias, tokens, inner, panels_count,
                     outputs, threads);
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
  return DONE;
}

template <typename T>
void label_logits(const float* hidden, const T* weight, const float* bias, const int64_t* labels,
                  float* logits, int64_t tokens, int64_t inner, int threads) {
  const bool is_large = tokens * inner >= WORTH_THREADS;
#pragma omp parallel for num_threads(threads) if (is_large)
  for (int64_t token = 0; token < tokens; token++) {
    const T* row = weight + labels[token] * inner;
    Vector total = splat(0.f);
    int64_t k = 0;
    for (; k + LANES <= inner; k += LANES)
      total = multiply_add(load(hidden + token * inner + k), load(row + k), total);
    float rest = 0;
    for (; k < inner; k++) rest += hidden[token * inner + k] * as_float(row[k]);
    logits[token] = sum(total) + rest + bias[labels[token]];
  }
}

}  // namespace

extern "C" {

// For outputs see there. Shapes: hidden (tokens, inner), label_logits, labels and outputs (tokens),
// bias (panels * WIDTH), with the least float or nearly that where there is no class. Returns an
// Outcome.
int head_float32(const float* hidden, const float* label_logits, const int64_t* labels,
                 const float* panels, const float* bias, float* nlls, double* totals,
                 double* weighted, int32_t* ranks, float* leads, int64_t tokens, int64_t inner,
                 int64_t panels_count, int threads) {
  return head(hidden, label_logits, labels, panels, bias, {nlls, totals, weighted, ranks, leads},
              tokens, inner, panels_count, threads);
}

#ifdef __AVX512BF16__
int head_bfloat16(const bfloat16* hidden, const float* label_logits, const int64_t* labels,
                  const bfloat16* panels, const float* bias, float* nlls, double* totals,
                  double* weighted, int32_t* ranks, float* leads, int64_t tokens, int64_t inner,
                  int64_t panels_count, int threads) {
  return head(hidden, label_logits, labels, panels, bias, {nlls, totals, weighted, ranks, leads},
              tokens, inner, panels_count, threads);
}
#endif

// z_label in float32. Shapes: hidden (tokens, inner), weight (classes, inner), bias (classes).
void label_logits_float32(const float* hidden, const float* weight, const float* bias,
                          const int64_t* labels, float* logits, int64_t tokens, int64_t inner,
                          int threads) {
  label_logits(hidden, weight, bias, labels, logits, tokens, inner, threads);
}

#ifdef __AVX512BF16__
void label_logits_bfloat16(const float* hidden, const bfloat16* weight, const float* bias,
                           const int64_t* labels, float* logits, int64_t tokens, int64_t inner,
                           int threads) {
  label_logits(hidden, weight, bias, labels, logits, tokens, inner, threads);
}
#endif
}
