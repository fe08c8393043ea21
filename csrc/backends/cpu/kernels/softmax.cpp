#include "backends/cpu/kernels/softmax.h"

#include "backends/cpu/kernels/lanes.h"
#include "backends/cpu/kernels/vec_math.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

constexpr std::int64_t kChunk = 2048;  // floats between two readings of a row: 8 KiB, well inside L1

float row_max(const float* x, std::int64_t size) {
  const Vec lowest = Vec{} - __builtin_inff();
  Vec a = lowest, b = lowest, c = lowest, d = lowest;
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    a = max(a, load(x + i));
    b = max(b, load(x + i + kLanes));
    c = max(c, load(x + i + 2 * kLanes));
    d = max(d, load(x + i + 3 * kLanes));
  }
  float result = reduce_max(max(max(a, b), max(c, d)));
  for (; i < size; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// Sum over the row of f(vector, block); lanes beyond the end are made -inf, whose exponential is zero.
template <class F>
FLEXCORE_INLINE float sum_exponentials(const float* x, std::int64_t size, F&& f) {
  Vec sums[2] = {};
  std::int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    sums[0] += f(load(x + i), Whole{i});
    sums[1] += f(load(x + i + kLanes), Whole{i + kLanes});
  }
  sweep(i, size, [&](auto block) {
    const VecI inside = kLaneIndex + static_cast<std::int32_t>(block.i) < static_cast<std::int32_t>(size);
    sums[0] += f(inside ? block.get(x) : Vec{} - __builtin_inff(), block);
  });
  return reduce_add(sums[0] + sums[1]);
}

float single_exp(float x) { return vec::exp(Vec{} + x)[0]; }

template <class E>
float absorb(const float* x, std::int64_t size, SoftmaxState* state, void* e) {
  const float chunk_max = row_max(x, size), old = state->max;
  const float top = chunk_max > old ? chunk_max : old;
  // With nothing but -inf so far, the differences are taken from 0: they stay -inf instead of NaN.
  const float base = top == -__builtin_inff() ? 0.0f : top;
  const float factor = old == top ? 1.0f : single_exp(old - base);
  float sum;
  if (e)
    sum = sum_exponentials(x, size, [&](Vec v, auto block) {
      const Vec p = vec::exp(v - base);
      block.put(static_cast<E*>(e), p);
      return p;
    });
  else
    sum = sum_exponentials(x, size, [&](Vec v, auto) { return vec::exp(v - base); });
  state->max = top;
  state->sum = state->sum * static_cast<double>(factor) + static_cast<double>(sum);
  return factor;
}

void scale(float* x, std::int64_t size, float factor) {
  sweep(0, size, [&](auto block) { block.put(x, block.get(x) * factor); });
}

template <class Out>
void finish_gradient(const float* sum, const float* row, std::int64_t size, float inverse, float scale, void* out) {
  sweep(0, size,
        [&](auto block) { block.put(static_cast<Out*>(out), scale * (block.get(sum) * inverse - block.get(row))); });
}

RowPeak peak(const float* x, std::int64_t size) {
  SoftmaxState state;
  std::int64_t where = 0;
  for (std::int64_t i = 0; i < size; i += kChunk) {
    const float before = state.max;
    absorb<float>(x + i, size - i < kChunk ? size - i : kChunk, &state, nullptr);
    if (state.max > before) where = i;
  }
  while (where + 1 < size && x[where] != state.max) ++where;
  const double sum = state.max == -__builtin_inff() ? __builtin_nan("") : state.sum;
  return {state.max, sum, static_cast<std::int32_t>(where)};
}

std::int64_t block_maxima(const float* x, std::int64_t size, float* maxima) {
  constexpr std::int64_t kBlock = 32;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < size; i += kBlock)
    maxima[count++] = row_max(x + i, size - i < kBlock ? size - i : kBlock);
  return count;
}

std::int64_t collect(const float* x, std::int64_t size, float threshold, float* values, std::int32_t* ids) {
  constexpr std::int64_t kBlock = 4 * kLanes;
  std::int64_t count = 0, i = 0;
  const auto take = [&](std::int64_t end) {
    for (; i < end; ++i) {
      values[count] = x[i];
      ids[count] = static_cast<std::int32_t>(i);
      count += x[i] >= threshold;
    }
  };
  // Most blocks hold nothing: one test for each.
  while (i + kBlock <= size) {
    const VecI any = (load(x + i) >= threshold) | (load(x + i + kLanes) >= threshold) |
                     (load(x + i + 2 * kLanes) >= threshold) | (load(x + i + 3 * kLanes) >= threshold);
    if (reduce_max(any ? Vec{} + 1.0f : Vec{}) > 0)
      take(i + kBlock);
    else
      i += kBlock;
  }
  take(size);
  return count;
}

double exponentials(const float* x, std::int64_t size, float max, float inverse_temperature, float* p) {
  double sum = 0;
  for (std::int64_t i = 0; i < size; i += kChunk) {
    const std::int64_t end = size - i < kChunk ? size - i : kChunk;
    sum += static_cast<double>(sum_exponentials(x + i, end, [&](Vec v, auto block) {
      const Vec e = vec::exp((v - max) * inverse_temperature);
      block.put(p + i, e);
      return e;
    }));
  }
  return sum;
}

}  // namespace

const SoftmaxKernels& softmax_kernels() {
  static constexpr SoftmaxKernels kTable = {{absorb<float>, absorb<bfloat16>},
                                            scale,
                                            {finish_gradient<float>, finish_gradient<bfloat16>},
                                            peak,
                                            block_maxima,
                                            collect,
                                            exponentials};
  return kTable;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
