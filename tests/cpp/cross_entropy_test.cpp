#include "ops/cross_entropy.h"

#include <gtest/gtest.h>

#include "op_fixture.h"

namespace flexcore::test {
namespace {

OpFixture& fixture() {
  static OpFixture ops(2);
  return ops;
}

/// A weight as a WeightView, packed or row-major.
class Weight {
 public:
  Weight(Matrix matrix, bool packed) : matrix_(std::move(matrix)), packed_(packed) {
    if (!packed) return;
    std::size_t bytes = 0;
    fixture().run(PackedWeightBytesArgs{matrix_.rows(), matrix_.width(), matrix_.dtype(), &bytes});
    buffer_ = Buffer(test_runtime().allocator(), ledger_, MemoryTag::kWeights, bytes);
    fixture().run(PackWeightArgs{matrix_.view(), matrix_.dtype(), buffer_.data()});
  }
  WeightView view() {
    return {packed_ ? buffer_.data() : matrix_.view().data(), matrix_.dtype(), matrix_.rows(), matrix_.width(),
            packed_};
  }
  const Matrix& matrix() const { return matrix_; }

 private:
  Matrix matrix_;
  bool packed_;
  MemoryLedger ledger_;
  Buffer buffer_;
};

struct Case {
  std::int64_t rows, hidden, vocab;
  float scale;  // of hidden: large values make the running maximum jump
};
const Case kCases[] = {{1, 16, 5, 1.0f},     {3, 33, 2048, 5.0f}, {5, 24, 4099, 20.0f},
                       {530, 8, 2100, 3.0f}, {40, 9, 9001, 8.0f}, {2, 100, 13001, 3.0f}};

void expect_oracle(const Case& c, DType hidden_type, DType weight_type, DType grad_type, bool packed) {
  std::mt19937 rng(c.rows + c.vocab);
  auto hidden = Matrix::random(hidden_type, c.rows, c.hidden, rng, c.scale, 2);
  Weight weight(Matrix::random(weight_type, c.vocab, c.hidden, rng, 0.5f), packed);
  auto scale = Matrix::random(DType::kFloat32, 1, c.rows, rng);
  Matrix loss(DType::kFloat32, 1, c.rows), only_loss = loss, grad(grad_type, c.rows, c.hidden, 3);
  SharedVector<std::int32_t> labels(c.rows);
  for (auto& label : labels) label = static_cast<std::int32_t>(rng() % c.vocab);
  labels[0] = static_cast<std::int32_t>(c.vocab - 1);
  LinearCrossEntropyArgs args{hidden.view(),
                              weight.view(),
                              {labels.data(), DType::kInt32, {c.rows}},
                              loss.view().reshape({c.rows}),
                              scale.view().reshape({c.rows}),
                              grad.view()};
  fixture().run(args);

  // The oracle sees hidden as the GEMM does: in the weight's dtype.
  const auto rounded = [&](double x) {
    return weight_type == DType::kBFloat16 ? to_float(to_bfloat16(static_cast<float>(x))) : x;
  };
  const double tolerance = weight_type == DType::kBFloat16 ? 6e-3 : 1e-5;
  double error = 0, norm = 0;
  for (std::int64_t i = 0; i < c.rows; ++i) {
    std::vector<double> logits(c.vocab);
    double top = -1e300, sum = 0;
    for (std::int64_t v = 0; v < c.vocab; ++v) {
      for (std::int64_t k = 0; k < c.hidden; ++k) logits[v] += rounded(hidden(i, k)) * weight.matrix()(v, k);
      top = std::max(top, logits[v]);
    }
    for (const double logit : logits) sum += std::exp(logit - top);
    const double wanted = top + std::log(sum) - logits[labels[i]];
    EXPECT_NEAR(loss(0, i), wanted, 2e-5 * (1 + std::abs(top))) << i;
    for (std::int64_t k = 0; k < c.hidden; ++k) {
      double mean = 0;
      for (std::int64_t v = 0; v < c.vocab; ++v) mean += std::exp(logits[v] - top) / sum * weight.matrix()(v, k);
      const double gradient = scale(0, i) * (mean - weight.matrix()(labels[i], k));
      error += (grad(i, k) - gradient) * (grad(i, k) - gradient), norm += gradient * gradient;
    }
  }
  EXPECT_LE(std::sqrt(error / norm), grad_type == DType::kBFloat16 ? 6e-3 : tolerance);
  EXPECT_TRUE(grad.gaps_untouched());

  args.loss = only_loss.view().reshape({c.rows}), args.grad_hidden = {}, args.grad_scale = {};
  fixture().run(args);
  EXPECT_TRUE(only_loss.same(loss));
}

TEST(CrossEntropy, MatchesOracle) {
  for (auto c : kCases) {
    if (emulated() && c.rows > 180) c.rows = 180, c.vocab = 1100;  // two blocks of rows, two chunks
    for (const auto weight_type : kFloats)
      for (const bool packed : {false, true}) {
        expect_oracle(c, DType::kFloat32, weight_type, DType::kFloat32, packed);
        expect_oracle(c, DType::kBFloat16, weight_type, DType::kBFloat16, packed);
      }
  }
}

TEST(CrossEntropy, RowsDoNotSeeTheirBatch) {
  constexpr std::int64_t kRows = 40, kHidden = 48, kVocab = 4500;
  std::mt19937 rng(9);
  OpFixture three(3);
  for (const auto type : kFloats) {
    auto hidden = Matrix::random(type, kRows, kHidden, rng, 2.0f);
    Weight weight(Matrix::random(type, kVocab, kHidden, rng, 0.5f), true);
    auto scale = Matrix::random(DType::kFloat32, 1, kRows, rng);
    SharedVector<std::int32_t> labels(kRows, 4400);
    Matrix loss(DType::kFloat32, 1, kRows), alone_loss = loss, grad(type, kRows, kHidden), alone_grad = grad;
    const auto run = [&](OpFixture& ops, std::int64_t begin, std::int64_t end, Matrix& l, Matrix& g) {
      const auto part = [&](Matrix& m) { return m.view().reshape({kRows}).rows(begin, end); };
      ops.run(LinearCrossEntropyArgs{hidden.view().rows(begin, end), weight.view(),
                                     TensorView(labels.data(), DType::kInt32, {kRows}).rows(begin, end), part(l),
                                     part(scale), g.view().rows(begin, end)});
    };
    run(three, 0, kRows, loss, grad);
    for (std::int64_t i = 0; i < kRows; ++i) run(fixture(), i, i + 1, alone_loss, alone_grad);
    if (on_cpu()) {
      EXPECT_TRUE(loss.same(alone_loss));
      EXPECT_TRUE(grad.same(alone_grad));
    } else {  // how logits are cut depends on the number of rows
      EXPECT_LE(worst_error(loss, [&](auto i, auto j) { return alone_loss(i, j); }), 2e-5);
      EXPECT_LE(worst_error(grad, [&](auto i, auto j) { return alone_grad(i, j); }), 2 * epsilon(type));
    }
  }
}

TEST(CrossEntropy, NoRowsAndBadLabels) {
  Matrix hidden(DType::kFloat32, 0, 8);
  std::mt19937 rng(1);
  Weight weight(Matrix::random(DType::kFloat32, 6, 8, rng), false);
  LinearCrossEntropyArgs args{hidden.view(),
                              weight.view(),
                              TensorView(nullptr, DType::kInt32, {0}),
                              TensorView(nullptr, DType::kFloat32, {0}),
                              {},
                              {}};
  fixture().run(args);
  auto row = Matrix::random(DType::kFloat32, 1, 8, rng);
  SharedVector<std::int32_t> label = {6};
  SharedVector<float> loss = {-1};
  args.hidden = row.view();
  args.labels = TensorView(label.data(), DType::kInt32, {1});
  args.loss = TensorView(loss.data(), DType::kFloat32, {1});
  if (!on_cpu()) {  // labels are in the device's memory: what cannot be looked up becomes NaN
    SharedVector<float> scale = {1};
    Matrix grad(DType::kFloat32, 1, 8);
    for (const std::int32_t bad : {6, -1}) {
      label[0] = bad, loss[0] = -1, grad.set(0, 3, 0.0f);
      args.grad_scale = TensorView(scale.data(), DType::kFloat32, {1}), args.grad_hidden = grad.view();
      fixture().run(args);
      EXPECT_TRUE(std::isnan(loss[0]));
      EXPECT_TRUE(std::isnan(grad(0, 3)));
    }
    return;
  }
  try {
    fixture().run(args);
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), "linear_cross_entropy: labels[0] is 6, wanted in [0, 6)");
  }
}

// The same bits at every run, and logits of -infinity and NaN are what they are on a line of numbers.
TEST(CrossEntropy, RepeatsItselfAndKeepsNan) {
  constexpr std::int64_t kRows = 3, kVocab = 6000;
  std::mt19937 rng(4);
  for (const auto type : kFloats) {
    auto hidden = Matrix::random(type, kRows, 8, rng);
    auto matrix = Matrix::random(type, kVocab, 8, rng);
    for (std::int64_t v = 0; v < 3000; ++v) matrix.set(v, 0, -INFINITY);  // -inf for rows 0 and 2, +inf for row 1
    hidden.set(0, 0, 1.0f), hidden.set(1, 0, -1.0f), hidden.set(2, 0, 0.5f);
    Weight weight(matrix, true);
    SharedVector<std::int32_t> labels(kRows, 5000);
    Matrix first(DType::kFloat32, 1, kRows), second = first;
    for (auto* loss : {&first, &second})
      fixture().run(LinearCrossEntropyArgs{hidden.view(),
                                           weight.view(),
                                           {labels.data(), DType::kInt32, {kRows}},
                                           loss->view().reshape({kRows}),
                                           {},
                                           {}});
    EXPECT_TRUE(first.same(second));
    EXPECT_TRUE(std::isfinite(first(0, 0)) && std::isfinite(first(0, 2)));
    EXPECT_TRUE(std::isnan(first(0, 1)));
  }
}

}  // namespace
}  // namespace flexcore::test
