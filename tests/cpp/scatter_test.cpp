#include "ops/scatter.h"

#include <gtest/gtest.h>

#include "op_fixture.h"

namespace flexcore::test {
namespace {

OpFixture& fixture() {
  static OpFixture ops(2);
  return ops;
}

/// A sequence's store: three tensors of 3 (float32), `width` (dtype) and 5 (float32) columns, NaN everywhere.
struct Store {
  Store(std::int64_t length_, std::int64_t width_, DType dtype_, bool odd)
      : length(length_),
        width(width_),
        dtype(dtype_),
        offset(odd ? 12 : 16),
        bytes((offset + static_cast<std::size_t>(width) * dtype_size(dtype) + 20) * static_cast<std::size_t>(length),
              std::byte{0xff}) {}
  TensorView tensor() {
    return TensorView(bytes.data() + offset * static_cast<std::size_t>(length), dtype, {length, width});
  }
  double at(std::int64_t row, std::int64_t column) {
    return dtype == DType::kBFloat16 ? to_float(tensor().row<bfloat16>(row)[column]) : tensor().row<float>(row)[column];
  }
  bool untouched(std::size_t begin, std::size_t end) const {
    return std::all_of(bytes.begin() + static_cast<std::ptrdiff_t>(begin * static_cast<std::size_t>(length)),
                       bytes.begin() + static_cast<std::ptrdiff_t>(end * static_cast<std::size_t>(length)),
                       [](std::byte b) { return b == std::byte{0xff}; });
  }

  std::int64_t length, width;
  DType dtype;
  std::size_t offset;  // bytes a token of the tensor before
  SharedVector<std::byte> bytes;
};

TEST(SaveRows, PutsEveryRowAtItsDepthAndNothingElsewhere) {
  std::mt19937 rng(3);
  for (const std::int64_t width : {1, 3, 8, 17, 64, 576})
    for (const auto x_type : kFloats)
      for (const auto y_type : kFloats)
        for (const bool odd : {false, true}) {
          auto x = Matrix::random(x_type, 13, width, rng, 1.0f, 2);
          Store a(7, width, y_type, odd), b(9, width, y_type, odd);
          // Rows 2..4 are positions 4..6 of a, rows 9..12 positions 0..3 of b; the others belong to nobody.
          const SaveSpan spans[] = {{2, 5, a.bytes.data(), 7, 4}, {6, 6, nullptr, 0, 0}, {9, 13, b.bytes.data(), 9, 0}};
          fixture().run(SaveRowsArgs{x.view(), spans, y_type, a.offset});
          for (auto [store, first, begin, end] : {std::tuple(&a, 2, 4, 7), std::tuple(&b, 9, 0, 4)}) {
            const std::size_t before = store->offset, size = static_cast<std::size_t>(width) * dtype_size(y_type);
            EXPECT_TRUE(store->untouched(0, before) && store->untouched(before + size, before + size + 20));
            for (std::int64_t row = 0; row < store->length; ++row)
              for (std::int64_t j = 0; j < width; ++j) {
                const double got = store->at(row, j);
                if (row < begin || row >= end) {
                  EXPECT_TRUE(std::isnan(got));
                } else {
                  const double wanted = x(first + row - begin, j);
                  EXPECT_LE(std::abs(got - wanted), epsilon(y_type) * std::abs(wanted)) << width;
                }
              }
          }
        }
}

// Codes in groups of 64: no element is off by more than half a step, however large or small its neighbours.
TEST(SaveRows, CodesComeBackWithinHalfAStep) {
  std::mt19937 rng(7);
  for (const std::int64_t width : {1, 3, 63, 64, 65, 130, 576})
    for (const auto x_type : kFloats)
      for (const auto y_type : kFloats) {
        const std::int64_t bytes = kept_row_bytes(DType::kUInt8, width), length = 9;
        EXPECT_EQ(bytes % 16, 0);
        EXPECT_LT(bytes, width + 4 * (width / 64 + 1) + 16);
        auto x = Matrix::random(x_type, 6, width, rng, 3.0f, 2);
        for (std::int64_t j = 0; j < width; ++j) x.set(1, j, 0.625f);             // all the same
        for (std::int64_t j = 0; j < width; ++j) x.set(2, j, -1e-30f * (j % 7));  // tiny
        x.set(3, width - 1, 3e4f);                                                // one that is far out
        SharedVector<std::byte> store(static_cast<std::size_t>((bytes + 16) * length), std::byte{0xff});
        const SaveSpan spans[] = {
            {0, 4, store.data(), length, 5}, {4, 4, nullptr, 0, 0}, {5, 6, store.data(), length, 0}};
        fixture().run(SaveRowsArgs{x.view(), spans, DType::kUInt8, 16});
        const TensorView kept(store.data() + 16 * length, DType::kUInt8, {length, bytes});
        Matrix y(y_type, length, width, 3);
        fixture().run(LoadRowsArgs{kept.rows(5, 9), y.view().rows(5, 9)});
        fixture().run(LoadRowsArgs{kept.rows(0, 1), y.view().rows(0, 1)});
        EXPECT_TRUE(y.gaps_untouched());
        for (const auto& [from, to] : {std::pair(0, 5), {1, 6}, {2, 7}, {3, 8}, {5, 0}})
          for (std::int64_t j = 0; j < width; ++j) {
            double low = x(from, j), high = low;
            for (std::int64_t k = j / 64 * 64; k < std::min(width, j / 64 * 64 + 64); ++k)
              low = std::min(low, x(from, k)), high = std::max(high, x(from, k));
            // The minimum and the step have eight bits each.
            const double step = (high - low + std::abs(low) / 128) / 255 * (1 + 1.0 / 128);
            const double allowed = step / 2 * 1.001 + epsilon(y_type) * std::abs(x(from, j)) + 1e-37;
            EXPECT_LE(std::abs(y(to, j) - x(from, j)), allowed) << width << " row " << from << " column " << j;
          }
        for (std::int64_t row = 1; row < 5; ++row)
          for (std::int64_t i = 0; i < bytes; ++i) ASSERT_EQ(kept.as<std::uint8_t>()[row * bytes + i], 0xff);
      }
}

TEST(SaveRows, WhatIsNotFiniteStaysSo) {
  Matrix x(DType::kFloat32, 2, 70), y(DType::kFloat32, 2, 70);
  for (std::int64_t i = 0; i < 2; ++i)
    for (std::int64_t j = 0; j < 70; ++j) x.set(i, j, 1.0f + static_cast<float>(j));
  x.set(0, 3, std::numeric_limits<float>::quiet_NaN());
  x.set(1, 66, std::numeric_limits<float>::infinity());
  SharedVector<std::byte> store(static_cast<std::size_t>(2 * kept_row_bytes(DType::kUInt8, 70)));
  const SaveSpan span{0, 2, store.data(), 2, 0};
  fixture().run(SaveRowsArgs{x.view(), {&span, 1}, DType::kUInt8, 0});
  fixture().run(
      LoadRowsArgs{TensorView(store.data(), DType::kUInt8, {2, kept_row_bytes(DType::kUInt8, 70)}), y.view()});
  for (std::int64_t j = 0; j < 64; ++j) EXPECT_TRUE(std::isnan(y(0, j)) && std::isfinite(y(1, j))) << j;
  for (std::int64_t j = 64; j < 70; ++j) EXPECT_TRUE(std::isfinite(y(0, j)) && std::isnan(y(1, j))) << j;
}

TEST(SaveRows, RefusesWhatDoesNotFit) {
  std::mt19937 rng(4);
  auto x = Matrix::random(DType::kFloat32, 4, 8, rng);
  Store store(5, 8, DType::kFloat32, false);
  std::byte* data = store.bytes.data();
  for (const SaveSpan span : {SaveSpan{0, 5, data, 5, 0}, SaveSpan{2, 1, data, 5, 0}, SaveSpan{0, 4, data, 5, 2},
                              SaveSpan{0, 1, nullptr, 5, 0}, SaveSpan{0, 1, data, 5, -1}})
    EXPECT_THROW(fixture().run(SaveRowsArgs{x.view(), {&span, 1}, DType::kFloat32, 16}), InvalidArgument);
  EXPECT_TRUE(store.untouched(0, 16 + 32 + 20));
}

TEST(ScatterRows, WritesItsRowsAlone) {
  std::mt19937 rng(5);
  for (const std::int64_t width : {1, 3, 8, 97}) {
    auto x = Matrix::random(DType::kFloat32, 3, width, rng);
    Matrix y(DType::kFloat32, 6, width, 3);
    SharedVector<std::int32_t> index{5, 0, 2};
    fixture().run(ScatterRowsArgs{x.view(), TensorView(index.data(), DType::kInt32, {3}), y.view()});
    for (const auto& [to, from] : {std::pair(5, 0), std::pair(0, 1), std::pair(2, 2)})
      EXPECT_TRUE(y.same_row(to, x, from));
    for (const int row : {1, 3, 4})
      for (std::int64_t j = 0; j < width; ++j) EXPECT_TRUE(std::isnan(y(row, j)));
    EXPECT_TRUE(y.gaps_untouched());
  }
}

}  // namespace
}  // namespace flexcore::test
