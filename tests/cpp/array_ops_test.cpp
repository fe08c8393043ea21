#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "flexcore/ops.h"
#include "op_fixture.h"

// The public C++ form of the array ops, as a program outside sees it. The kernels have tests of their own; the values
// are held against torch in tests/python/test_ops.py.
namespace flexcore {
namespace {

using test::SharedVector, test::test_device;

SharedVector<float> normal(std::int64_t size, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> draw;
  SharedVector<float> out(size);
  for (auto& x : out) x = draw(rng);
  return out;
}

TensorView view(SharedVector<float>& data, std::initializer_list<std::int64_t> shape) {
  return TensorView(data.data(), DType::kFloat32, shape);
}

// Rows 0..2 use adapter 1, row 3 none, rows 4..6 adapter 0.
struct LoraCase {
  static constexpr std::int64_t kTokens = 7, kIn = 20, kOut = 12, kRank = 3;
  SharedVector<float> x = normal(kTokens * kIn, 1), weight = normal(kOut * kIn, 2), a = normal(2 * kRank * kIn, 3),
                      b = normal(2 * kOut * kRank, 4);
  std::vector<float> scaling = {0.5f, -2.0f};
  std::vector<std::int32_t> indptr = {0, 3, 4, 7}, adapter_ids = {1, -1, 0};
  ops::LoraLayer layer = {view(x, {kTokens, kIn}),
                          view(weight, {kOut, kIn}),
                          view(a, {2, kRank, kIn}),
                          view(b, {2, kOut, kRank}),
                          scaling,
                          TensorView(indptr.data(), DType::kInt32, {4}),
                          TensorView(adapter_ids.data(), DType::kInt32, {3})};

  int adapter_of(std::int64_t row) const { return row < 3 ? 1 : row == 3 ? -1 : 0; }
  double y(std::int64_t row, std::int64_t out) const {
    double sum = 0;
    for (std::int64_t i = 0; i < kIn; ++i) sum += x[row * kIn + i] * weight[out * kIn + i];
    const int adapter = adapter_of(row);
    for (std::int64_t r = 0; adapter >= 0 && r < kRank; ++r) {
      double u = 0;
      for (std::int64_t i = 0; i < kIn; ++i) u += x[row * kIn + i] * a[(adapter * kRank + r) * kIn + i];
      sum += scaling[adapter] * u * b[(adapter * kOut + out) * kRank + r];
    }
    return sum;
  }
};

TEST(ArrayOps, LoraForwardOfARaggedBatch) {
  LoraCase c;
  ops::Runtime runtime(2, test_device());
  EXPECT_EQ(runtime.num_threads(), 2);
  EXPECT_EQ(runtime.device(), test_device());
  SharedVector<float> y(c.kTokens * c.kOut, NAN);
  runtime.synchronously([&] { ops::lora_forward(runtime, c.layer, view(y, {c.kTokens, c.kOut})); });
  for (std::int64_t i = 0; i < c.kTokens; ++i)
    for (std::int64_t j = 0; j < c.kOut; ++j) EXPECT_NEAR(y[i * c.kOut + j], c.y(i, j), 1e-4);
}

TEST(ArrayOps, LoraGradientsAddUpOverWindows) {
  LoraCase c;
  ops::Runtime first(1, test_device());
  ops::Runtime runtime = std::move(first);
  auto grad_y = normal(c.kTokens * c.kOut, 5);
  const auto backward = [&](SharedVector<float>& grad_x, SharedVector<float>& grad_a, SharedVector<float>& grad_b) {
    runtime.synchronously([&] {
      ops::lora_backward(runtime, c.layer, view(grad_y, {c.kTokens, c.kOut}), view(grad_x, {c.kTokens, c.kIn}),
                         view(grad_a, {2, c.kRank, c.kIn}), view(grad_b, {2, c.kOut, c.kRank}));
    });
  };
  SharedVector<float> grad_x(c.x.size(), NAN), grad_a(c.a.size()), grad_b(c.b.size());
  backward(grad_x, grad_a, grad_b);
  // The loss sum(grad_y * y) is linear in each entry.
  const auto loss = [&] {
    double sum = 0;
    for (std::int64_t i = 0; i < c.kTokens; ++i)
      for (std::int64_t j = 0; j < c.kOut; ++j) sum += grad_y[i * c.kOut + j] * c.y(i, j);
    return sum;
  };
  for (auto [values, gradient] : {std::pair{&c.x, &grad_x}, std::pair{&c.a, &grad_a}, std::pair{&c.b, &grad_b}}) {
    for (const std::size_t i : {std::size_t{0}, values->size() / 2, values->size() - 1}) {
      const float kept = (*values)[i];
      (*values)[i] = kept + 1;
      const double above = loss();
      (*values)[i] = kept - 1;
      EXPECT_NEAR((*gradient)[i], (above - loss()) / 2, 1e-3);
      (*values)[i] = kept;
    }
  }
  auto twice_x = grad_x, twice_a = grad_a, twice_b = grad_b;
  backward(twice_x, twice_a, twice_b);
  EXPECT_EQ(twice_x, grad_x);  // written
  for (std::size_t i = 0; i < grad_a.size(); ++i) EXPECT_NEAR(twice_a[i], 2 * grad_a[i], 1e-4);
  for (std::size_t i = 0; i < grad_b.size(); ++i) EXPECT_NEAR(twice_b[i], 2 * grad_b[i], 1e-4);
}

TEST(ArrayOps, SampledTokensComeBack) {
  ops::Runtime runtime(1, test_device());
  auto logits = normal(3 * 40, 6), logprobs = SharedVector<float>(3, NAN);
  SharedVector<std::int32_t> tokens(3, -1);
  runtime.synchronously([&] {
    ops::sample(runtime, view(logits, {3, 40}), {.temperature = 0.0f}, TensorView(tokens.data(), DType::kInt32, {3}),
                view(logprobs, {3}));
  });
  for (std::int64_t row = 0; row < 3; ++row) {
    const float* begin = logits.data() + 40 * row;
    EXPECT_EQ(tokens[row], std::max_element(begin, begin + 40) - begin);
    double total = 0;
    for (int i = 0; i < 40; ++i) total += std::exp(begin[i]);
    EXPECT_NEAR(logprobs[row], begin[tokens[row]] - std::log(total), 1e-4);
  }
}

// Outputs in memory that only the device reaches.
TEST(ArrayOps, DownloadsFromTheDevice) {
  ops::Runtime runtime(1, test_device());
  MemoryLedger ledger;
  const Buffer y(test::test_runtime().allocator(), ledger, MemoryTag::kWorkspace, 4 * sizeof(float));
  auto gate = normal(4, 7), up = SharedVector<float>(4, 2.0f);
  float got[4] = {};
  runtime.synchronously([&] {
    ops::silu_mul(runtime, view(gate, {1, 4}), view(up, {1, 4}), y.view(DType::kFloat32, {1, 4}));
    runtime.download(got, y.data(), sizeof(got));
  });
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(got[i], 2 * gate[i] / (1 + std::exp(-gate[i])), 1e-5);
}

TEST(ArrayOps, AnErrorComesThrough) {
  ops::Runtime runtime(1, test_device());
  EXPECT_THROW(runtime.synchronously([&] { ops::linear(runtime, {}, {}, {}, {}); }), InvalidArgument);
  EXPECT_THROW(ops::Runtime(1, Device{DeviceKind::kCuda, 99}), Error);
}

template <class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(ArrayOps, ErrorsNameTheArgument) {
  LoraCase c;
  ops::Runtime runtime(1, test_device());
  SharedVector<float> y(c.kTokens * c.kOut);
  const auto run = [&] { ops::lora_forward(runtime, c.layer, view(y, {c.kTokens, c.kOut})); };
  c.indptr = {0, 3, 4, 8};
  EXPECT_EQ(message_of(run), "lora_forward: indptr goes from 0 to 8, wanted from 0 to 7");
  c.indptr = {0, 5, 4, 7};
  EXPECT_NE(message_of(run).find("indptr falls"), std::string::npos);
  c.indptr = {0, 3, 4, 7};
  c.adapter_ids[2] = -2;
  EXPECT_EQ(message_of(run), "lora_forward: adapter_ids[2] is -2, wanted in [-1, 2)");
  c.layer.scaling = {};
  EXPECT_NE(message_of(run).find("scaling has 0 values"), std::string::npos);
  EXPECT_NE(message_of([&] { ops::linear(runtime, {}, {}, {}, {}); }).find("linear: x"), std::string::npos);
  EXPECT_NE(message_of([&] { ops::attention(runtime, {}, {}, {}, {}, 1, 0); }).find("attention: q"), std::string::npos);
  EXPECT_NE(message_of([&] { ops::attention_backward_window(runtime, {}, {}, {}, {}, {}, {}); }).find("grad_y"),
            std::string::npos);
  EXPECT_NE(message_of([&] { ops::rms_norm(runtime, {}, {}, {}, 0); }).find("rms_norm: x"), std::string::npos);
  EXPECT_NE(message_of([&] { ops::rotary(runtime, {}, {}, {}, {}, {}, false); }).find("rotary: x"), std::string::npos);
  EXPECT_NE(message_of([&] { ops::sample(runtime, {}, {}, {}, {}); }).find("sample: logits"), std::string::npos);
}

}  // namespace
}  // namespace flexcore
