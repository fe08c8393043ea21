#include "cases/array.h"
#include "cases/models.h"
#include "cases/op_case.h"
#include "ops/norm.h"
#include "ops/rotary.h"
#include "ops/silu_mul.h"

namespace flexcore::cases {

namespace {

constexpr auto kF32 = DType::kFloat32, kBF16 = DType::kBFloat16;
constexpr float kEps = 1e-5f;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

/// f(row, column) over some elements of a matrix.
template <class F>
void sample_matrix(const Array& m, F&& f) {
  sample(m.view().shape(0), 5,
         [&](std::int64_t i) { sample(m.view().shape(1), 31, [&](std::int64_t j) { f(i, j); }); });
}

// As in a layer: the residual stream is float32, what linears read is bfloat16.
struct RmsNorm {
  RmsNorm(OpContext&, std::int64_t rows, std::int64_t width)
      : x(kF32, {rows, width}, Noise{1}), weight(kF32, {width}, Noise{2}), y(kBF16, {rows, width}) {}
  void run(OpContext& context) { flexcore::run(context, RmsNormArgs{x.view(), weight.view(), y.view(), kEps}); }
  Accuracy check() const {
    Accuracy accuracy{.allowed = epsilon(kBF16)};
    sample_matrix(y, [&](std::int64_t i, std::int64_t j) {
      double squares = 0;
      for (std::int64_t k = 0; k < x.view().shape(1); ++k) squares += x.at(i, k) * x.at(i, k);
      accuracy.see(y.at(i, j),
                   x.at(i, j) / std::sqrt(squares / static_cast<double>(x.view().shape(1)) + kEps) * weight[j]);
    });
    return accuracy;
  }
  Array x, weight, y;
};

struct RmsNormBackward {
  RmsNormBackward(OpContext&, std::int64_t rows, std::int64_t width)
      : grad_y(kF32, {rows, width}, Noise{3}),
        x(kBF16, {rows, width}, Noise{1}),
        weight(kF32, {width}, Noise{2}),
        grad_x(kF32, {rows, width}, 0.0f) {}
  void run(OpContext& context) {
    flexcore::run(context, RmsNormBackwardArgs{grad_y.view(), x.view(), weight.view(), grad_x.view(), kEps,
                                               GradMode::kAccumulate});
  }
  Accuracy check() const {
    Accuracy accuracy{.allowed = 1e-4};
    const std::int64_t width = x.view().shape(1);
    sample_matrix(grad_x, [&](std::int64_t i, std::int64_t j) {
      double squares = 0, product = 0;
      for (std::int64_t k = 0; k < width; ++k) {
        squares += x.at(i, k) * x.at(i, k);
        product += grad_y.at(i, k) * weight[k] * x.at(i, k);
      }
      const double r = 1 / std::sqrt(squares / static_cast<double>(width) + kEps);
      accuracy.see(grad_x.at(i, j),
                   r * (grad_y.at(i, j) * weight[j] - x.at(i, j) * r * r * product / static_cast<double>(width)));
    });
    return accuracy;
  }
  Array grad_y, x, weight, grad_x;
};

struct SiluMul {
  SiluMul(OpContext&, std::int64_t rows, std::int64_t width)
      : gate(kBF16, {rows, width}, Noise{1}), up(kBF16, {rows, width}, Noise{2}), y(kBF16, {rows, width}) {}
  void run(OpContext& context) { flexcore::run(context, SiluMulArgs{gate.view(), up.view(), y.view()}); }
  Accuracy check() const {
    Accuracy accuracy{.allowed = epsilon(kBF16)};
    sample_matrix(y, [&](std::int64_t i, std::int64_t j) {
      accuracy.see(y.at(i, j), gate.at(i, j) * sigmoid(gate.at(i, j)) * up.at(i, j));
    });
    return accuracy;
  }
  Array gate, up, y;
};

struct SiluMulBackward {
  SiluMulBackward(OpContext&, std::int64_t rows, std::int64_t width)
      : grad_y(kF32, {rows, width}, Noise{3}),
        gate(kBF16, {rows, width}, Noise{1}),
        up(kBF16, {rows, width}, Noise{2}),
        grad_gate(kBF16, {rows, width}),
        grad_up(kBF16, {rows, width}) {}
  void run(OpContext& context) {
    flexcore::run(context,
                  SiluMulBackwardArgs{grad_y.view(), gate.view(), up.view(), grad_gate.view(), grad_up.view()});
  }
  Accuracy check() const {
    Accuracy accuracy{.allowed = epsilon(kBF16)};
    sample_matrix(grad_up, [&](std::int64_t i, std::int64_t j) {
      const double g = gate.at(i, j), s = sigmoid(g);
      accuracy.see(grad_up.at(i, j), grad_y.at(i, j) * g * s);
      accuracy.see(grad_gate.at(i, j), grad_y.at(i, j) * up.at(i, j) * s * (1 + g * (1 - s)));
    });
    return accuracy;
  }
  Array grad_y, gate, up, grad_gate, grad_up;
};

struct Rotary {
  Rotary(OpContext&, std::int64_t rows, std::int64_t heads, std::int64_t dim)
      : x(kBF16, {rows, heads, dim}, Noise{1}),
        y(kBF16, {rows, heads, dim}),
        cos(kF32, {rows, dim / 2}, Noise{2, 0.5f}),
        sin(kF32, {rows, dim / 2}, Noise{3, 0.5f}),
        positions(backwards(rows)) {}
  static std::vector<std::int32_t> backwards(std::int64_t rows) {
    std::vector<std::int32_t> all;
    for (std::int64_t i = 0; i < rows; ++i) all.push_back(static_cast<std::int32_t>(rows - 1 - i));
    return all;
  }
  void run(OpContext& context) {
    flexcore::run(context, RotaryArgs{x.view(), y.view(), positions.view(), cos.view(), sin.view()});
  }
  Accuracy check() const {
    Accuracy accuracy{.allowed = epsilon(kBF16)};
    const std::int64_t dim = x.view().shape(2), half = dim / 2;
    sample(x.size(), 200, [&](std::int64_t i) {
      const std::int64_t d = i % dim, row = i / (dim * x.view().shape(1)), position = x.view().shape(0) - 1 - row;
      const double c = cos.at(position, d % half), s = sin.at(position, d % half);
      accuracy.see(y[i], d < half ? x[i] * c - x[i + half] * s : x[i] * c + x[i - half] * s);
    });
    return accuracy;
  }
  Array x, y, cos, sin;
  Integers positions;
};

// Too few operations a byte for anything but bandwidth to matter: no FLOPs are counted.
Cost bytes(std::int64_t elements, double read, double written) {
  return {.read = static_cast<double>(elements) * read, .written = static_cast<double>(elements) * written};
}

}  // namespace

void add_elementwise_cases(std::vector<CaseSpec>& table) {
  for (const auto* model : {&kSmolLm2, &kLlama8b}) {
    const auto add = [&](const char* op, std::int64_t rows, const Cost& cost, auto make) {
      table.push_back({op, model->name, "tokens:" + std::to_string(rows), cost, make});
    };
    const std::int64_t hidden = model->hidden_size, wide = model->intermediate_size;
    const std::int64_t heads = model->num_heads, dim = model->head_dim;
    for (const std::int64_t n : {16, 512}) {
      add("rms_norm", n, bytes(n * hidden, 4, 2), maker<RmsNorm>(n, hidden));
      add("silu_mul", n, bytes(n * wide, 4, 2), maker<SiluMul>(n, wide));
      add("rotary", n, bytes(n * heads * dim, 2, 2), maker<Rotary>(n, heads, dim));
    }
    add("rms_norm_backward", 512, bytes(512 * hidden, 10, 4), maker<RmsNormBackward>(std::int64_t{512}, hidden));
    add("silu_mul_backward", 512, bytes(512 * wide, 8, 4), maker<SiluMulBackward>(std::int64_t{512}, wide));
  }
}

}  // namespace flexcore::cases
