#include "backends/cpu/kernels/bypass.h"

#include "backends/cpu/kernels/row_lanes.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

template <class X, class Y>
void scale(const ScaleRows& t, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const X* x = row<X>(t.x, i);
    Y* y = row<Y>(t.y, i);
    if (t.offset == nullptr)
      sweep(0, t.width, [&](auto block) { block.put(y, block.get(x) * block.get(t.scale)); });
    else
      sweep(0, t.width, [&](auto block) {
        const Vec offset = block.get(t.offset);
        block.put(y, offset + block.get(t.scale) * (block.get(x) - offset));
      });
  }
}

template <class G, class X>
void scale_gradient(const ScaleGradient& t, std::int64_t begin, std::int64_t end) {
  sweep(begin, end, [&](auto block) {
    Vec sum{};
    const Vec offset = t.offset == nullptr ? Vec{} : block.get(t.offset);
    for (std::int64_t i = 0; i < t.rows; ++i)
      sum += block.get(row<G>(t.grad_y, i)) * (block.get(row<X>(t.x, i)) - offset);
    if (t.divisor != nullptr) {
      // Lanes beyond the last column divide by one, not by zero.
      const Vec divisor = block.get(t.divisor);
      sum = sum / (divisor == 0.0f ? Vec{} + 1.0f : divisor);
    }
    block.put(t.grad_scale, block.get(t.grad_scale) + sum);
  });
}

// ---- dropout --------------------------------------------------------------------------------------------------------

typedef std::uint64_t WideVec __attribute__((vector_size(kLanes * 8)));

struct Product {
  VecU high, low;
};
FLEXCORE_INLINE Product multiply(VecU a, std::uint32_t b) {
  const WideVec product = __builtin_convertvector(a, WideVec) * std::uint64_t{b};
  return {__builtin_convertvector(product >> 32, VecU), __builtin_convertvector(product, VecU)};
}

struct Random {
  VecU word[4];
};
/// core/philox.h, a vector of counters at once.
FLEXCORE_INLINE Random philox(const std::uint32_t (&seed)[2], VecU first, std::uint32_t second, std::uint32_t third,
                              std::uint32_t fourth) {
  std::uint32_t key[2] = {seed[0], seed[1]};
  Random x{{first, VecU{} + second, VecU{} + third, VecU{} + fourth}};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Product a = multiply(x.word[0], 0xd2511f53u), b = multiply(x.word[2], 0xcd9e8d57u);
    x = {{b.high ^ x.word[1] ^ key[0], b.low, a.high ^ x.word[3] ^ key[1], a.low}};
    key[0] += 0x9e3779b9u, key[1] += 0xbb67ae85u;
  }
  return x;
}

template <class X, class Y>
void dropout(const DropoutRows& t, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kBlock = 128, kCalls = 16;
  for (std::int64_t i = begin; i < end; ++i) {
    const X* x = row<X>(t.x, i);
    Y* y = row<Y>(t.y, i);
    const auto position = t.position + static_cast<std::uint32_t>(i);
    for (std::int64_t block = 0; block < t.width; block += kBlock)
      for (std::int64_t call = 0; call < kCalls && block + call < t.width; call += kLanes) {
        const auto first = static_cast<std::uint32_t>(block / kBlock * kCalls + call);
        const VecU counter = __builtin_bit_cast(VecU, kLaneIndex) + first;
        const Random random = philox(t.key, counter, position, t.module, t.sequence);
#pragma GCC unroll 8
        for (int n = 0; n < 8; ++n) {
          const std::int64_t column = block + n * kCalls + call;
          if (column >= t.width) break;
          const VecU number = n % 2 == 0 ? random.word[n / 2] & 0xffffu : random.word[n / 2] >> 16;
          const Vec factor = number < t.threshold ? Vec{} + t.dropped : Vec{} + t.kept;
          const auto apply = [&](auto part) {
            const Vec kept = factor == 0.0f ? Vec{} : part.get(x) * factor;  // zero times infinity is not dropped
            part.put(y, t.accumulate ? part.get(y) + kept : kept);
          };
          if (column + kLanes <= t.width)
            apply(Whole{column});
          else
            apply(Part{column, t.width - column});
        }
      }
  }
}

void norm(const NormRows& t, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float* x = t.x + i * t.stride;
    Vec sum{};
    sweep(0, t.width, [&](auto block) {
      const Vec v = block.get(x);
      sum += v * v;
    });
    t.norm[i] = __builtin_sqrtf(reduce_add(sum));
  }
}

constexpr BypassKernels make_table() {
  BypassKernels t{};
  each_dtype([&](int i, auto a) {
    each_dtype([&](int j, auto b) {
      using A = decltype(a);
      using B = decltype(b);
      t.scale[i][j] = scale<A, B>;
      t.scale_gradient[i][j] = scale_gradient<A, B>;
      t.dropout[i][j] = dropout<A, B>;
    });
  });
  t.norm = norm;
  return t;
}

}  // namespace

const BypassKernels& bypass_kernels() {
  static constexpr BypassKernels kTable = make_table();
  return kTable;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
