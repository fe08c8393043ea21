#include "backends/cpu/kernels/elementwise.h"

#include "backends/cpu/kernels/row_lanes.h"
#include "backends/cpu/kernels/vec_math.h"

namespace flexcore::cpu::FLEXCORE_ISA {

namespace {

// Sum over a row of f(block), in four chains: one would wait for its own additions.
template <class F>
FLEXCORE_INLINE float sum_over(std::int64_t width, F&& f) {
  Vec a{}, b{}, c{}, d{};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
    a += f(Whole{i});
    b += f(Whole{i + kLanes});
    c += f(Whole{i + 2 * kLanes});
    d += f(Whole{i + 3 * kLanes});
  }
  sweep(i, width, [&](auto block) { a += f(block); });
  return reduce_add((a + b) + (c + d));
}

FLEXCORE_INLINE float inverse_rms(float sum_squares, std::int64_t width, float eps) {
  return 1.0f / __builtin_sqrtf(sum_squares / static_cast<float>(width) + eps);
}

template <class X, class Y>
void rms_norm(const RmsNormRows& t, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const X* x = row<X>(t.x, i);
    Y* y = row<Y>(t.y, i);
    const float squares = sum_over(t.width, [&](auto block) {
      const Vec v = block.get(x);
      return v * v;
    });
    const float r = inverse_rms(squares, t.width, t.eps);
    sweep(0, t.width, [&](auto block) { block.put(y, block.get(x) * r * block.get(t.weight)); });
  }
}

template <class G, class X, class D>
void rms_norm_backward(const RmsNormBackwardRows& t, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const G* grad_y = row<G>(t.grad_y, i);
    const X* x = row<X>(t.x, i);
    D* grad_x = row<D>(t.grad_x, i);
    const float squares = sum_over(t.width, [&](auto block) {
      const Vec v = block.get(x);
      return v * v;
    });
    const float product =
        sum_over(t.width, [&](auto block) { return block.get(grad_y) * block.get(t.weight) * block.get(x); });
    const float r = inverse_rms(squares, t.width, t.eps);
    const float along = r * r * product / static_cast<float>(t.width);  // r * mean(g * n)
    if (t.accumulate) {
      sweep(0, t.width, [&](auto block) {
        const Vec g = block.get(grad_y) * block.get(t.weight);
        block.put(grad_x, block.get(grad_x) + r * (g - along * block.get(x)));
      });
    } else {
      sweep(0, t.width, [&](auto block) {
        const Vec g = block.get(grad_y) * block.get(t.weight);
        block.put(grad_x, r * (g - along * block.get(x)));
      });
    }
  }
}

template <class X, class Y>
void rotary(const RotaryRows& t, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float* cos = t.cos + t.positions[i] * t.half;
    const float* sin = t.sin + t.positions[i] * t.half;
    for (std::int64_t h = 0; h < t.num_heads; ++h) {
      const X* x = row<X>(t.x, i) + h * t.x_head_stride;
      Y* y = row<Y>(t.y, i) + h * t.y_head_stride;
      sweep(0, t.half, [&](auto block) {
        const Vec first = block.get(x), second = block.get(x + t.half);
        const Vec c = block.get(cos), s = t.sign * block.get(sin);
        block.put(y, first * c - second * s);
        block.put(y + t.half, second * c + first * s);
      });
    }
  }
}

template <class X, class Y>
void silu_mul(const SiluMulRows& t, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const X *gate = row<X>(t.gate, i), *up = row<X>(t.up, i);
    Y* y = row<Y>(t.y, i);
    sweep(0, t.width, [&](auto block) { block.put(y, vec::silu(block.get(gate)) * block.get(up)); });
  }
}

template <class G, class X, class A, class B>
void silu_mul_backward(const SiluMulBackwardRows& t, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const G* grad_y = row<G>(t.grad_y, i);
    const X *gate = row<X>(t.gate, i), *up = row<X>(t.up, i);
    A* grad_gate = t.grad_gate.data ? row<A>(t.grad_gate, i) : nullptr;
    B* grad_up = t.grad_up.data ? row<B>(t.grad_up, i) : nullptr;
    sweep(0, t.width, [&](auto block) {
      const Vec x = block.get(gate), g = block.get(grad_y), u = block.get(up);
      const Vec s = vec::sigmoid(x);
      if (grad_gate) block.put(grad_gate, g * u * s * (1.0f + x * (1.0f - s)));
      if (grad_up) block.put(grad_up, g * (x * s));
    });
  }
}

template <class X, class Y>
void copy(const CopyRows& t, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    const X* x = row<X>(t.x, t.index ? t.index[i] : i);
    Y* y = row<Y>(t.y, i);
    if (t.accumulate)
      sweep(0, t.width, [&](auto block) { block.put(y, block.get(y) + block.get(x)); });
    else
      sweep(0, t.width, [&](auto block) { block.put(y, block.get(x)); });
  }
}

constexpr ElementwiseKernels make_table() {
  ElementwiseKernels t{};
  each_dtype([&](int i, auto a) {
    each_dtype([&](int j, auto b) {
      using A = decltype(a);
      using B = decltype(b);
      t.rms_norm[i][j] = rms_norm<A, B>;
      t.rotary[i][j] = rotary<A, B>;
      t.silu_mul[i][j] = silu_mul<A, B>;
      t.copy[i][j] = copy<A, B>;
      each_dtype([&](int k, auto c) {
        using C = decltype(c);
        t.rms_norm_backward[i][j][k] = rms_norm_backward<A, B, C>;
        each_dtype([&](int l, auto d) { t.silu_mul_backward[i][j][k][l] = silu_mul_backward<A, B, C, decltype(d)>; });
      });
    });
  });
  return t;
}

}  // namespace

const ElementwiseKernels& elementwise_kernels() {
  static constexpr ElementwiseKernels kTable = make_table();
  return kTable;
}

}  // namespace flexcore::cpu::FLEXCORE_ISA
