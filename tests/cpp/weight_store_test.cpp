#include "model/weight_store.h"

#include <cmath>
#include <limits>
#include <random>
#include <utility>

#include "backends/register.h"
#include "core/bfloat16.h"
#include "core/check.h"
#include "ops/linear.h"
#include "ops/registry.h"
#include "temp_dir.h"

namespace flexcore {
namespace {

using Tensors = std::vector<std::pair<std::string, TensorView>>;

class WeightStoreTest : public testing::Test {
 protected:
  WeightStoreTest() {
    std::mt19937 random(1);
    for (auto* values : {&matrix_, &other_, &vector_})
      for (float& value : *values) value = std::normal_distribution<float>()(random);
  }

  Tensors tensors() {
    return {{"norm", {vector_.data(), DType::kFloat32, {7}}},
            {"a", {matrix_.data(), DType::kFloat32, {5, 7}}},
            {"b", {other_.data(), DType::kFloat32, {33, 3}}}};
  }
  std::string write(const Tensors& tensors) {
    write_safetensors(dir_.path("model.safetensors"), tensors);
    return dir_.path();
  }
  /// What loading `specs` from the written model says.
  template <class E = ModelLoadError>
  std::string refusal(const std::vector<WeightSpec>& specs, DType dtype = DType::kFloat32) {
    const SafetensorsModel model(dir_.path());
    WeightStore store(context_, host_allocator(), ledger_, dtype);
    const auto message = message_of<E>([&] { store.load(model, specs); });
    EXPECT_EQ(ledger_.current(MemoryTag::kWeights), 0u);
    return message;
  }
  /// W itself, read back from a packed matrix as W^T times the unit vectors.
  std::vector<float> unpack(const WeightView& weight) {
    const auto n = weight.out_features, k = weight.in_features;
    std::vector<float> unit(static_cast<std::size_t>(k * k)), y(static_cast<std::size_t>(k * n), NAN), result(y.size());
    for (std::int64_t i = 0; i < k; ++i) unit[static_cast<std::size_t>(i * k + i)] = 1.0f;
    const LinearArgs::Member member{.weight = weight, .bias = {}, .y = {y.data(), DType::kFloat32, {k, n}}};
    run(context_, LinearArgs{{unit.data(), DType::kFloat32, {k, k}}, {&member, 1}});
    for (std::int64_t i = 0; i < k; ++i)
      for (std::int64_t j = 0; j < n; ++j)
        result[static_cast<std::size_t>(j * k + i)] = y[static_cast<std::size_t>(i * n + j)];
    return result;
  }

  TempDir dir_;
  MemoryLedger ledger_;
  Arena scratch_{host_allocator(), ledger_};
  ThreadPool threads_{2};
  OpRegistry registry_ = make_op_registry();
  OpContext context_{&registry_, {}, &threads_, &scratch_, nullptr};
  std::vector<float> matrix_ = std::vector<float>(35), other_ = std::vector<float>(99), vector_ = std::vector<float>(7);
  const std::vector<WeightSpec> specs_{{"b", 33, 3}, {"norm", 7, 0}, {"a", 5, 7}};
};

TEST_F(WeightStoreTest, KeepsWhatTheCheckpointHolds) {
  const SafetensorsModel model(write(tensors()));
  for (const auto dtype : {DType::kFloat32, DType::kBFloat16}) {
    WeightStore store(context_, host_allocator(), ledger_, dtype);
    store.load(model, specs_);
    EXPECT_EQ(store.bytes(), WeightStore::planned_bytes(context_, specs_, dtype));
    EXPECT_EQ(ledger_.current(MemoryTag::kWeights), store.bytes());
    const auto round = [&](std::vector<float> values) {
      if (dtype == DType::kBFloat16)
        for (float& value : values) value = to_float(to_bfloat16(value));
      return values;
    };
    EXPECT_EQ(unpack(store.matrix("a")), round(matrix_));
    EXPECT_EQ(unpack(store.matrix("b")), round(other_));
    EXPECT_EQ(store.matrix("b").dtype, dtype);
    const auto norm = store.vector("norm");
    EXPECT_EQ(std::vector<float>(norm.as<float>(), norm.as<float>() + norm.size()), vector_);
    EXPECT_THROW(store.matrix("norm"), InvalidArgument);
    EXPECT_THROW(store.vector("a"), InvalidArgument);
    EXPECT_THROW(store.matrix("c"), InvalidArgument);
  }
  EXPECT_EQ(ledger_.current(MemoryTag::kWeights), 0u);
}

TEST_F(WeightStoreTest, ReadsHalfPrecision) {
  std::uint16_t brain[] = {0x3f80, 0xc000, 0x3e80, 0x0000}, half[] = {0x3c00, 0xc000, 0x3400, 0x8000};
  write({{"brain", {brain, DType::kBFloat16, {2, 2}}},
         {"half", {half, DType::kFloat16, {2, 2}}},
         {"half_vector", {half, DType::kFloat16, {4}}}});
  for (const auto dtype : {DType::kFloat32, DType::kBFloat16}) {
    WeightStore store(context_, host_allocator(), ledger_, dtype);
    store.load(SafetensorsModel(dir_.path()),
               std::vector<WeightSpec>{{"brain", 2, 2}, {"half", 2, 2}, {"half_vector", 4, 0}});
    const std::vector<float> wanted{1, -2, 0.25f, 0};
    EXPECT_EQ(unpack(store.matrix("brain")), wanted);
    EXPECT_EQ(unpack(store.matrix("half")), wanted);
    EXPECT_EQ(store.vector("half_vector").as<float>()[2], 0.25f);
  }
}

// A one-byte tensor in front puts the others at odd addresses.
TEST_F(WeightStoreTest, ReadsTensorsAtOddBytes) {
  std::uint8_t byte = 1;
  auto all = tensors();
  all.insert(all.begin(), {"odd", {&byte, DType::kUInt8, {1}}});
  write(all);
  WeightStore store(context_, host_allocator(), ledger_, DType::kFloat32);
  store.load(SafetensorsModel(dir_.path()), specs_);
  EXPECT_EQ(unpack(store.matrix("a")), matrix_);
  EXPECT_EQ(store.vector("norm").as<float>()[6], vector_[6]);
}

TEST_F(WeightStoreTest, StoresATensorOnce) {
  write(tensors());
  auto twice = specs_;
  twice.push_back({"a", 5, 7});
  EXPECT_EQ(WeightStore::planned_bytes(context_, twice, DType::kFloat32),
            WeightStore::planned_bytes(context_, specs_, DType::kFloat32));
  twice.push_back({"a", 35, 0});
  EXPECT_HAS(refusal<InvalidArgument>(twice), "a: asked for as [5, 7] and as [35]");
}

TEST_F(WeightStoreTest, QuantisesWhatMayBe) {
  write(tensors());
  const WeightFormat format{WeightFormat::Kind::kInt4, 16};
  WeightStore store(context_, host_allocator(), ledger_, DType::kFloat32, format);
  const std::vector<WeightSpec> specs = {{"b", 33, 3, true}, {"norm", 7, 0}, {"a", 5, 7, true}, {"a", 5, 7}};
  store.load(SafetensorsModel(dir_.path()), specs);
  EXPECT_EQ(store.bytes(), WeightStore::planned_bytes(context_, specs, DType::kFloat32, format));
  EXPECT_LT(store.bytes(), WeightStore::planned_bytes(context_, specs, DType::kFloat32));
  EXPECT_EQ(store.matrix("b").format, format);
  EXPECT_FALSE(store.matrix("a").format.quantized());  // somebody wants it dense
  EXPECT_EQ(unpack(store.matrix("a")), matrix_);
}

TEST_F(WeightStoreTest, NamesTensorsThatAreMissingOrOfAnotherShape) {
  write(tensors());
  EXPECT_HAS(refusal({{"c", 5, 7}}), "no tensor c, wanted [5, 7]");
  EXPECT_HAS(refusal({{"a", 7, 5}}), "tensor a: shape [5, 7], wanted [7, 5]");
  EXPECT_HAS(refusal({{"norm", 8, 0}}), "tensor norm: shape [7], wanted [8]");
  std::int32_t numbers[4] = {};
  write({{"i", {numbers, DType::kInt32, {2, 2}}}});
  EXPECT_HAS(refusal<Unsupported>({{"i", 2, 2}}), "dtype I32, wanted F32, BF16 or F16");
}

TEST_F(WeightStoreTest, RefusesNumbersThatAreNotFinite) {
  const float bad[] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                       -std::numeric_limits<float>::infinity()};
  for (const float value : bad) {
    for (const std::size_t at : {std::size_t{0}, matrix_.size() - 1}) {
      const float before = std::exchange(matrix_[at], value);
      write(tensors());
      EXPECT_HAS(refusal(specs_), "tensor a: holds NaN");
      matrix_[at] = before;
    }
    vector_[3] = value;
    write(tensors());
    EXPECT_HAS(refusal(specs_), "tensor norm: holds NaN");
    vector_[3] = 0;
  }
  // Finite, but above what bfloat16 can hold.
  matrix_[2] = std::numeric_limits<float>::max();
  write(tensors());
  EXPECT_HAS(refusal(specs_, DType::kBFloat16), "tensor a");
  WeightStore store(context_, host_allocator(), ledger_, DType::kFloat32);
  EXPECT_NO_THROW(store.load(SafetensorsModel(dir_.path()), specs_));
}

TEST_F(WeightStoreTest, FindsOneBadNumberAmongMany) {
  std::vector<std::uint16_t> large(300000, 0x3f80);
  for (const std::size_t at : {std::size_t{0}, std::size_t{149999}, std::size_t{299999}}) {
    large[at] = 0x7f81;
    write({{"large", {large.data(), DType::kBFloat16, {300, 1000}}}});
    EXPECT_HAS(refusal({{"large", 300, 1000}}), "tensor large");
    large[at] = 0x3f80;
  }
}

TEST_F(WeightStoreTest, StaysAsItWasAfterAFailure) {
  write(tensors());
  WeightStore store(context_, host_allocator(), ledger_, DType::kFloat32);
  store.load(SafetensorsModel(dir_.path()), specs_);
  EXPECT_THROW(store.load(SafetensorsModel(dir_.path()), std::vector<WeightSpec>{{"c", 1, 1}}), ModelLoadError);
  EXPECT_EQ(unpack(store.matrix("a")), matrix_);
}

}  // namespace
}  // namespace flexcore
