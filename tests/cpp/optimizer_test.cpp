#include "ops/optimizer.h"

#include <gtest/gtest.h>

#include "op_fixture.h"

namespace flexcore::test {
namespace {

SharedVector<float> normals(std::size_t size, std::mt19937& rng, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  SharedVector<float> v(size);
  for (auto& x : v) x = normal(rng);
  return v;
}

constexpr std::size_t kSizes[] = {1, 0, 7, 9216, 50001};

OpFixture& fixture() {
  static OpFixture ops(2);
  return ops;
}

// Three steps of torch.optim.AdamW(lr=1e-2, weight_decay=0.1), torch 2.13.
TEST(AdamW, EqualsTorch) {
  SharedVector<float> param = {0.5f, -1.25f, 3.0f, 0.0f, 1e-3f}, exp_avg(5), exp_avg_sq(5);
  const SharedVector<float> grads[] = {
      {0.1f, -2.0f, 1e-4f, 0.0f, 5.0f}, {-0.3f, 0.7f, 2e-4f, 1e-6f, -4.0f}, {0.2f, 0.2f, -3e-4f, 0.0f, 1.0f}};
  for (int step = 1; step <= 3; ++step) {
    const AdamWArgs::Tensor tensor{param.data(), grads[step - 1].data(), exp_avg.data(), exp_avg_sq.data(), 5};
    fixture().run(AdamWArgs{.tensors = {&tensor, 1}, .step = step, .learning_rate = 1e-2, .weight_decay = 0.1});
  }
  const float wanted[] = {0.493270605802536f, -1.2300397157669067f, 2.9720544815063477f, -0.01298454962670803f,
                          -0.0109940804541111f};
  const float wanted_avg[] = {0.0011000006925314665f, -0.07900000363588333f, -3.900001956935739e-06f,
                              9.000000034120603e-08f, 0.14499999582767487f};
  const float wanted_sq[] = {0.00013989002036396414f, 0.004521514289081097f, 1.3994003178474657e-10f,
                             9.9900008123326e-16f, 0.04193402826786041f};
  for (int i = 0; i < 5; ++i) {
    EXPECT_NEAR(param[i], wanted[i], 2e-7f * (1e-2f + std::abs(wanted[i]))) << i;
    EXPECT_NEAR(exp_avg[i], wanted_avg[i], 5e-6f * std::abs(wanted_avg[i])) << i;
    EXPECT_NEAR(exp_avg_sq[i], wanted_sq[i], 3e-7f * std::abs(wanted_sq[i])) << i;
  }
}

TEST(AdamW, MatchesOracleOverManyTensorsAndSteps) {
  std::mt19937 rng(1);
  constexpr double kRate = 3e-3, kBeta1 = 0.85, kBeta2 = 0.95, kEps = 1e-6, kDecay = 0.02, kScale = 0.37;
  struct State {
    SharedVector<float> param, grad, exp_avg, exp_avg_sq;
    std::vector<double> p, m, v;
  };
  std::vector<State> states;
  for (const auto size : kSizes) {
    auto& s = states.emplace_back(
        State{normals(size, rng), {}, SharedVector<float>(size), SharedVector<float>(size), {}, {}, {}});
    s.p.assign(s.param.begin(), s.param.end());
    s.m.resize(size), s.v.resize(size);
  }
  for (int step = 1; step <= 4; ++step) {
    std::vector<AdamWArgs::Tensor> tensors;
    for (auto& s : states) {
      s.grad = normals(s.param.size(), rng);
      tensors.push_back({s.param.data(), s.grad.data(), s.exp_avg.data(), s.exp_avg_sq.data(),
                         static_cast<std::int64_t>(s.param.size())});
      for (std::size_t i = 0; i < s.p.size(); ++i) {
        const double g = kScale * s.grad[i];
        s.p[i] *= 1 - kRate * kDecay;
        s.m[i] += (1 - kBeta1) * (g - s.m[i]);
        s.v[i] = kBeta2 * s.v[i] + (1 - kBeta2) * g * g;
        const double denominator = std::sqrt(s.v[i]) / std::sqrt(1 - std::pow(kBeta2, step)) + kEps;
        s.p[i] -= kRate / (1 - std::pow(kBeta1, step)) * s.m[i] / denominator;
      }
    }
    fixture().run(AdamWArgs{tensors, step, kRate, kBeta1, kBeta2, kEps, kDecay, kScale});
  }
  for (const auto& s : states)
    for (std::size_t i = 0; i < s.p.size(); ++i) ASSERT_NEAR(s.param[i], s.p[i], 2e-6) << i;
}

TEST(Sgd, MatchesOracle) {
  std::mt19937 rng(2);
  for (const auto size : kSizes) {
    auto param = normals(size, rng);
    const auto before = param, grad = normals(size, rng);
    const SgdArgs::Tensor tensor{param.data(), grad.data(), static_cast<std::int64_t>(size)};
    fixture().run(SgdArgs{{&tensor, 1}, 0.1, 0.01, 0.5});
    for (std::size_t i = 0; i < size; ++i)
      ASSERT_NEAR(param[i], before[i] - 0.1 * (0.5 * grad[i] + 0.01 * before[i]), 1e-6);
  }
}

TEST(SumSquares, IsExactEnoughAndIndependentOfThreads) {
  std::mt19937 rng(3);
  std::vector<SharedVector<float>> data;
  std::vector<TensorView> tensors;
  double wanted = 0;
  for (const auto size : kSizes) {
    data.push_back(normals(size, rng, 100.0f));
    for (const float x : data.back()) wanted += double(x) * x;
  }
  for (auto& d : data) tensors.emplace_back(d.data(), DType::kFloat32, std::initializer_list{std::int64_t(d.size())});
  std::vector<double> results;
  for (const int threads : {1, 2, 5}) {
    OpFixture ops(threads);
    ops.run(SumSquaresArgs{tensors, &results.emplace_back(-1)});
  }
  EXPECT_NEAR(results[0], wanted, 1e-12 * wanted);
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
  double none = -1;
  fixture().run(SumSquaresArgs{{}, &none});
  EXPECT_EQ(none, 0);
}

TEST(Optimizer, BadArgumentsAreNamed) {
  float x = 1;
  const AdamWArgs::Tensor no_state{&x, &x, nullptr, &x, 1};
  EXPECT_THROW(fixture().run(AdamWArgs{.tensors = {&no_state, 1}}), InvalidArgument);
  EXPECT_THROW(fixture().run(AdamWArgs{.tensors = {}, .step = 0}), InvalidArgument);
  EXPECT_THROW(fixture().run(AdamWArgs{.tensors = {}, .beta2 = 1.0}), InvalidArgument);
  const SgdArgs::Tensor no_grad{&x, nullptr, 1};
  EXPECT_THROW(fixture().run(SgdArgs{.tensors = {&no_grad, 1}}), InvalidArgument);
}

}  // namespace
}  // namespace flexcore::test
