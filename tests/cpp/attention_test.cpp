#include <gtest/gtest.h>

#include "attention_reference.h"
#include "core/check.h"

namespace flexcore::test {
namespace {

constexpr auto kF32 = DType::kFloat32, kBF16 = DType::kBFloat16;

// Odd sizes of everything: dimensions that are no whole vectors, blocks that divide nothing, windows below and above a
// key block.
const AttentionShape kShapes[] = {
    {4, 2, 16, 16, 0, kF32, kF32},  {9, 3, 64, 16, 0, kF32, kF32},  {9, 3, 64, 16, 0, kBF16, kBF16},
    {1, 1, 8, 1, 0, kF32, kF32},    {5, 5, 24, 7, 0, kF32, kBF16},  {7, 1, 40, 5, 33, kBF16, kF32},
    {6, 2, 80, 3, 100, kF32, kF32}, {2, 1, 256, 64, 0, kF32, kF32}, {4, 2, 136, 100, 70, kBF16, kBF16},
    {3, 3, 64, 32, 1, kF32, kF32},  {64, 1, 8, 16, 0, kF32, kBF16}, {2, 2, 72, 11, 64, kF32, kF32},
};

OpFixture make_ops(int num_threads) { return OpFixture(num_threads); }

double tolerance(DType dtype) { return dtype == kBF16 ? 1.0 / 200 : 3e-6; }
double gradient_tolerance(DType dtype) { return dtype == kBF16 ? 1.0 / 50 : 1e-5; }

Accumulators zero_accumulators(const PagedSequences& world) {
  Accumulators result;
  for (const auto& s : world.sequences) {
    const SharedVector<float> zeros(static_cast<std::size_t>(s.length * s.k.width()));
    result.emplace_back(zeros, zeros);
  }
  return result;
}

double worst_error(const SharedVector<float>& got, const std::vector<double>& wanted) {
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i)
    worst = std::max(worst, std::abs(got[i] - wanted[i]) / (1 + std::abs(wanted[i])));
  return worst;
}

TEST(KvWrite, ConvertsToThePagesAndTouchesNothingElse) {
  std::mt19937 rng(1);
  OpFixture ops(2);
  for (const auto rows : kFloats) {
    for (const auto pages : kFloats) {
      const AttentionShape shape{
          .num_heads = 3, .num_kv_heads = 3, .head_dim = 24, .block_size = 5, .rows = rows, .pages = pages};
      PagedSequences world(shape, {23, 1, 40}, rng);
      auto k = Matrix::random(rows, 64, 72, rng, 1.0f, 4), v = Matrix::random(rows, 64, 72, rng, 1.0f, 4);
      const AttentionSpan spans[] = {
          {40, 60, 3, world.tables[0].data()}, {0, 1, 0, world.tables[1].data()}, {2, 40, 0, world.tables[2].data()}};
      const auto before_keys = world.keys, before_values = world.values;
      ops.run(KvWriteArgs{head_view(k, 3, 4), head_view(v, 3, 4), world.pages(), spans});
      std::vector<bool> written(static_cast<std::size_t>(world.keys.rows()));
      const std::size_t owner[] = {0, 1, 2};
      for (std::size_t s = 0; s < 3; ++s) {
        for (std::int64_t row = spans[s].row_begin; row < spans[s].row_end; ++row) {
          for (std::int64_t h = 0; h < 3; ++h) {
            const auto at = world.page_row(owner[s], spans[s].position + row - spans[s].row_begin, h);
            written[at] = true;
            for (std::int64_t d = 0; d < 24; ++d) {
              const auto round = [&](double x) {
                return pages == kBF16 ? to_float(to_bfloat16(x)) : static_cast<float>(x);
              };
              ASSERT_EQ(world.keys(at, d), round(k(row, h * 24 + d)));
              ASSERT_EQ(world.values(at, d), round(v(row, h * 24 + d)));
            }
          }
        }
      }
      for (std::int64_t i = 0; i < world.keys.rows(); ++i) {
        if (written[i]) continue;
        EXPECT_TRUE(world.keys.same_row(i, before_keys, i));
        EXPECT_TRUE(world.values.same_row(i, before_values, i));
      }
    }
  }
}

TEST(Attention, MatchesTheDefinition) {
  std::mt19937 rng(2);
  for (const auto& shape : kShapes) {
    PagedSequences world(shape, {270, 1, 65, 131, 64}, rng);
    for (const int threads : on_cpu() ? std::vector{1, 3} : std::vector{1}) {
      auto ops = make_ops(threads);
      world.fill_pages(ops);
      Batch batch(
          world,
          {{0, 269, 270}, {3, 100, 131}, {1, 0, 1}, {2, 0, 65}, {0, 7, 7}, {0, 250, 269}, {4, 63, 64}, {3, 0, 2}}, 8);
      batch.forward(ops);
      EXPECT_LT(batch.error(batch.y, &Sequence::y), tolerance(shape.rows)) << "head_dim " << shape.head_dim;
      EXPECT_LT(batch.error(batch.lse, &Sequence::lse), 2e-6) << "head_dim " << shape.head_dim;
      EXPECT_TRUE(batch.y.gaps_untouched() && batch.lse.gaps_untouched());
      Batch again(world, batch.pieces);
      again.forward(ops, /*want_lse=*/false);
      EXPECT_TRUE(again.y.same(batch.y));
      EXPECT_TRUE(std::isnan(again.lse(0, 0)));
    }
  }
}

TEST(Attention, LargeScoresDoNotOverflow) {
  std::mt19937 rng(3);
  auto ops = make_ops(2);
  PagedSequences world({.head_dim = 64}, {90}, rng);
  for (auto& s : world.sequences)
    for (std::int64_t i = 0; i < s.length; ++i)
      for (std::int64_t j = 0; j < s.q.width(); ++j) s.q.set(i, j, static_cast<float>(1e4 * s.q(i, j)));
  world.fill_pages(ops);
  Batch batch(world, {{0, 0, 90}});
  batch.forward(ops);
  for (std::int64_t i = 0; i < 90; ++i)
    for (std::int64_t j = 0; j < batch.y.width(); ++j) ASSERT_TRUE(std::isfinite(batch.y(i, j)));
}

// The law that serving rests on: a row's bits do not depend on the cut, on its neighbours, or on the number of threads.
// On CUDA, where the batch decides how keys are split, they may differ in the last places, but never from run to run.
TEST(Attention, RowsAreBitIdenticalHoweverTheyAreBatched) {
  if (!on_cpu()) GTEST_SKIP() << "a promise of the CPU's";
  std::mt19937 rng(4);
  for (const auto& shape :
       {AttentionShape{9, 3, 64, 16, 0, kF32, kF32}, AttentionShape{9, 3, 64, 16, 0, kBF16, kBF16},
        AttentionShape{4, 4, 24, 7, 300, kF32, kBF16}, AttentionShape{8, 1, 80, 16, 130, kF32, kF32}}) {
    PagedSequences world(shape, {520, 200}, rng);
    auto alone = make_ops(1);
    world.fill_pages(alone);
    Batch whole(world, {{0, 0, 520}});
    whole.forward(alone);
    const auto expect_same = [&](const Batch& batch, const char* what) {
      std::int64_t row = 0;
      for (const auto& piece : batch.pieces) {
        for (std::int64_t i = piece.begin; i < piece.end; ++i, ++row) {
          if (piece.sequence != 0) continue;
          ASSERT_TRUE(batch.y.same_row(row, whole.y, i)) << what << ", position " << i;
          ASSERT_TRUE(batch.lse.same_row(row, whole.lse, i)) << what << ", position " << i;
        }
      }
    };
    for (const int threads : {1, 3}) {
      auto ops = make_ops(threads);
      for (int trial = 0; trial < 3; ++trial) {
        std::vector<Piece> pieces{{1, 0, 77}, {1, 199, 200}};
        for (const auto& [begin, end] : random_cuts(520, rng)) pieces.push_back({0, begin, end});
        std::shuffle(pieces.begin(), pieces.end(), rng);
        Batch batch(world, pieces);
        batch.forward(ops);
        expect_same(batch, "random cuts");
      }
      for (const std::int64_t i : {0, 1, 63, 64, 255, 256, 257, 511, 519}) {
        Batch batch(world, {{0, i, i + 1}});
        batch.forward(ops);
        expect_same(batch, "one row");
      }
      for (const std::int64_t n : {2, 17, 100}) {
        Batch batch(world, {{0, 520 - n, 520}});
        batch.forward(ops);
        expect_same(batch, "a chunk alone");
      }
    }
  }
}

TEST(AttentionBackward, OneShotMatchesTheDefinition) {
  std::mt19937 rng(5);
  for (const auto& shape : kShapes) {
    auto ops = make_ops(3);
    PagedSequences world(shape, {150, 1, 65}, rng);
    world.fill_pages(ops);
    Batch batch(world, {{2, 0, 65}, {0, 0, 150}, {1, 0, 1}, {0, 9, 9}}, 8);
    batch.forward(ops);
    auto sums = zero_accumulators(world);
    batch.backward(ops, sums);
    const double bound = gradient_tolerance(shape.rows);
    EXPECT_LT(batch.error(batch.grad_q, &Sequence::grad_q), bound) << "head_dim " << shape.head_dim;
    EXPECT_LT(batch.error(batch.grad_k, &Sequence::grad_k), bound) << "head_dim " << shape.head_dim;
    EXPECT_LT(batch.error(batch.grad_v, &Sequence::grad_v), bound) << "head_dim " << shape.head_dim;
    EXPECT_TRUE(batch.grad_q.gaps_untouched() && batch.grad_k.gaps_untouched() && batch.grad_v.gaps_untouched());
    for (std::size_t s = 0; s < sums.size(); ++s) {
      EXPECT_LT(worst_error(sums[s].first, world.sequences[s].grad_k), bound);
      EXPECT_LT(worst_error(sums[s].second, world.sequences[s].grad_v), bound);
    }
  }
}

// DESIGN.md section 4: any split into windows, taken from the right, gives the one-shot gradient.
TEST(AttentionBackward, AnySplitIntoWindowsGivesTheSameGradient) {
  std::mt19937 rng(6);
  for (const auto& shape : {AttentionShape{9, 3, 64, 16, 0, kF32, kF32}, AttentionShape{4, 2, 24, 5, 90, kF32, kF32}}) {
    const std::int64_t length = emulated() ? 110 : 330, other_length = emulated() ? 40 : 97;
    PagedSequences world(shape, {length, other_length}, rng);
    for (int trial = 0; trial < (emulated() ? 3 : 6); ++trial) {
      auto ops = make_ops(1 + trial % 3);
      world.fill_pages(ops);
      auto sums = zero_accumulators(world);
      auto cuts = random_cuts(length, rng), other = random_cuts(other_length, rng);
      if (trial == 0) {
        cuts.clear();
        for (std::int64_t i = 0; i < length; ++i) cuts.emplace_back(i, i + 1);
      }
      // Windows of both sequences share calls while both have any left.
      while (!cuts.empty() || !other.empty()) {
        std::vector<Piece> pieces;
        if (!other.empty()) pieces.push_back({1, other.back().first, other.back().second}), other.pop_back();
        if (!cuts.empty()) pieces.push_back({0, cuts.back().first, cuts.back().second}), cuts.pop_back();
        Batch batch(world, pieces);
        batch.forward(ops);
        batch.backward(ops, sums);
        EXPECT_LT(batch.error(batch.grad_q, &Sequence::grad_q), 5e-6);
        EXPECT_LT(batch.error(batch.grad_k, &Sequence::grad_k), 5e-6);
        EXPECT_LT(batch.error(batch.grad_v, &Sequence::grad_v), 5e-6);
      }
      for (std::size_t s = 0; s < 2; ++s) {
        EXPECT_LT(worst_error(sums[s].first, world.sequences[s].grad_k), 5e-6);
        EXPECT_LT(worst_error(sums[s].second, world.sequences[s].grad_v), 5e-6);
      }
    }
  }
}

TEST(AttentionBackward, BitsDoNotDependOnThreads) {
  std::mt19937 rng(7);
  const AttentionShape shape{9, 3, 64, 16, 0, kBF16, kBF16};
  const std::int64_t length = emulated() ? 150 : 400;
  PagedSequences world(shape, {length, 120}, rng);
  auto ops = make_ops(1);
  world.fill_pages(ops);
  Batch batch(world, {{0, 0, length}, {1, 30, 120}});
  batch.forward(ops);
  auto sums = zero_accumulators(world);
  batch.backward(ops, sums);
  for (const int threads : {2, 4}) {
    auto team = make_ops(threads);
    Batch same = batch;
    auto other = zero_accumulators(world);
    same.backward(team, other);
    EXPECT_TRUE(same.grad_q.same(batch.grad_q) && same.grad_k.same(batch.grad_k) && same.grad_v.same(batch.grad_v));
    EXPECT_EQ(other, sums);
  }
}

// Few rows with many keys: a device splits the keys, or computes a row in several warps. The groups fill tiles of every
// size, in part and over their edges.
const AttentionShape kLongShapes[] = {
    {4, 1, 64, 16, 0, kF32, kF32},      {4, 1, 64, 16, 0, kBF16, kBF16},   {2, 1, 128, 16, 0, kBF16, kBF16},
    {2, 1, 128, 7, 400, kBF16, kBF16},  {3, 1, 256, 16, 0, kBF16, kBF16},  {1, 1, 104, 16, 333, kF32, kBF16},
    {20, 1, 64, 16, 0, kBF16, kBF16},   {40, 1, 16, 16, 0, kBF16, kBF16},  {70, 1, 8, 16, 0, kBF16, kBF16},
    {150, 1, 8, 16, 300, kBF16, kBF16}, {17, 1, 160, 16, 0, kBF16, kBF16}, {20, 1, 24, 3, 0, kF32, kF32},
};

std::int64_t long_length(const AttentionShape& shape) { return shape.num_heads > 4 ? 600 : 1100; }

TEST(Attention, FewRowsWithManyKeys) {
  std::mt19937 rng(10);
  for (auto shape : kLongShapes) {
    shape.last_rows = 10;
    const std::int64_t length = long_length(shape);
    PagedSequences world(shape, {length, 290}, rng);
    auto ops = make_ops(2);
    world.fill_pages(ops);
    for (const auto& pieces : {std::vector<Piece>{{0, length - 1, length}},
                               {{0, length - 4, length}, {1, 289, 290}, {1, 281, 283}},
                               {{1, 280, 290}, {0, length - 10, length - 5}, {0, length - 1, length}}}) {
      Batch batch(world, pieces, 8);
      batch.forward(ops);
      EXPECT_LT(batch.error(batch.y, &Sequence::y), tolerance(shape.rows)) << "head_dim " << shape.head_dim;
      EXPECT_LT(batch.error(batch.lse, &Sequence::lse), 2e-6) << "head_dim " << shape.head_dim;
      EXPECT_TRUE(batch.y.gaps_untouched() && batch.lse.gaps_untouched());
      Batch again(world, pieces);
      again.forward(ops);
      EXPECT_TRUE(again.y.same(batch.y) && again.lse.same(batch.lse));
    }
  }
}

TEST(AttentionBackward, FewRowsWithManyKeys) {
  std::mt19937 rng(11);
  for (auto shape : kLongShapes) {
    shape.last_rows = 9;
    const std::int64_t length = long_length(shape);
    PagedSequences world(shape, {length, 90}, rng);
    auto ops = make_ops(2);
    world.fill_pages(ops);
    auto sums = zero_accumulators(world);
    // Sums over the rows of a group, each rounded.
    const auto group = static_cast<double>(shape.num_heads) / static_cast<double>(shape.num_kv_heads);
    const double bound =
        gradient_tolerance(shape.rows) * (shape.rows == kBF16 ? std::max(1.0, std::sqrt(group / 16)) : 1);
    Batch batch(world, {{0, length - 9, length}, {1, 81, 90}}, 8);
    batch.forward(ops);
    batch.backward(ops, sums);
    EXPECT_LT(batch.error(batch.grad_q, &Sequence::grad_q), bound) << "head_dim " << shape.head_dim;
    EXPECT_LT(batch.error(batch.grad_k, &Sequence::grad_k), bound) << "head_dim " << shape.head_dim;
    EXPECT_LT(batch.error(batch.grad_v, &Sequence::grad_v), bound) << "head_dim " << shape.head_dim;
    EXPECT_TRUE(batch.grad_q.gaps_untouched() && batch.grad_k.gaps_untouched());
    for (std::size_t s = 0; s < 2; ++s) {
      EXPECT_LT(worst_error(sums[s].first, world.sequences[s].grad_k), bound);
      EXPECT_LT(worst_error(sums[s].second, world.sequences[s].grad_v), bound);
    }
  }
}

// Rows whose heads are no whole vectors apart.
TEST(Attention, UnalignedRows) {
  std::mt19937 rng(12);
  for (const auto dtype : kFloats) {
    const AttentionShape shape{4, 2, 24, 5, 0, dtype, dtype};
    PagedSequences world(shape, {70}, rng);
    auto ops = make_ops(2);
    world.fill_pages(ops);
    Batch batch(world, {{0, 3, 70}}, 1);
    batch.forward(ops);
    EXPECT_LT(batch.error(batch.y, &Sequence::y), tolerance(dtype));
    auto sums = zero_accumulators(world);
    batch.backward(ops, sums);
    EXPECT_LT(batch.error(batch.grad_q, &Sequence::grad_q), gradient_tolerance(dtype));
    EXPECT_TRUE(batch.y.gaps_untouched() && batch.grad_q.gaps_untouched() && batch.grad_k.gaps_untouched());
  }
}

// A step of the engine: decode rows, prefill chunks and finetune windows in one batch, with gradients for the windows.
TEST(AttentionBackward, WindowsBesideRowsThatOnlyServe) {
  std::mt19937 rng(13);
  for (const auto& shape : {AttentionShape{9, 3, 64, 5, 0, kF32, kF32}, AttentionShape{4, 2, 64, 16, 0, kBF16, kBF16},
                            AttentionShape{6, 2, 24, 16, 50, kBF16, kBF16}}) {
    PagedSequences world(shape, {170, 33, 90, 45, 1}, rng);
    auto ops = make_ops(2);
    world.fill_pages(ops);
    Batch batch(world, {{0, 169, 170}, {1, 10, 33}, {2, 21, 90}, {4, 0, 1}, {3, 44, 45}, {1, 9, 9}, {0, 140, 169}}, 8);
    const std::vector<bool> trains{false, false, true, false, true, false, false};
    batch.forward(ops);
    EXPECT_LT(batch.error(batch.y, &Sequence::y), tolerance(shape.rows));
    auto sums = zero_accumulators(world);
    batch.backward(ops, sums, trains);
    const double bound = gradient_tolerance(shape.rows);
    for (std::size_t i = 0; i < batch.pieces.size(); ++i) {
      const Sequence& s = world.sequences[batch.pieces[i].sequence];
      for (std::int64_t row = batch.spans[i].row_begin; row < batch.spans[i].row_end; ++row) {
        const std::int64_t position = batch.pieces[i].begin + row - batch.spans[i].row_begin;
        for (const auto& [got, wanted] : {std::pair{&batch.grad_q, &s.grad_q}, std::pair{&batch.grad_k, &s.grad_k},
                                          std::pair{&batch.grad_v, &s.grad_v}})
          for (std::int64_t j = 0; j < got->width(); ++j) {
            const double w = (*wanted)[static_cast<std::size_t>(position * got->width() + j)];
            if (trains[i])
              ASSERT_NEAR((*got)(row, j), w, bound * (1 + std::abs(w))) << "piece " << i << ", position " << position;
            else
              ASSERT_TRUE(std::isnan((*got)(row, j))) << "piece " << i;
          }
      }
    }
    const auto none = zero_accumulators(world);
    for (const std::size_t s : {0, 1, 4}) EXPECT_EQ(sums[s], none[s]) << s;
  }
}

// All 2^(n - 1) ways to cut n rows into windows.
TEST(AttentionBackward, EverySplitOfAShortSequence) {
  std::mt19937 rng(14);
  constexpr std::int64_t kLength = 6;
  for (const auto dtype : kFloats) {
    const AttentionShape shape{4, 2, 24, 2, 0, dtype, dtype};
    PagedSequences world(shape, {kLength}, rng);
    auto ops = make_ops(2);
    world.fill_pages(ops);
    const double bound = gradient_tolerance(dtype);
    for (unsigned cuts = 0; cuts < 1u << (kLength - 1); ++cuts) {
      auto sums = zero_accumulators(world);
      for (std::int64_t begin, end = kLength; end > 0; end = begin) {
        begin = end - 1;
        while (begin > 0 && (cuts >> (begin - 1) & 1u) == 0) --begin;
        Batch batch(world, {{0, begin, end}});
        batch.forward(ops);
        batch.backward(ops, sums);
        EXPECT_LT(batch.error(batch.grad_q, &Sequence::grad_q), bound) << "cuts " << cuts;
        EXPECT_LT(batch.error(batch.grad_k, &Sequence::grad_k), bound) << "cuts " << cuts;
        EXPECT_LT(batch.error(batch.grad_v, &Sequence::grad_v), bound) << "cuts " << cuts;
      }
      EXPECT_LT(worst_error(sums[0].first, world.sequences[0].grad_k), bound) << "cuts " << cuts;
      EXPECT_LT(worst_error(sums[0].second, world.sequences[0].grad_v), bound) << "cuts " << cuts;
    }
  }
}

TEST(Attention, EveryHeadDim) {
  std::mt19937 rng(15);
  for (std::int64_t dim = 8; dim <= 256; dim += 8) {
    for (const auto dtype : kFloats) {
      PagedSequences world({3, 1, dim, 16, 0, dtype, dtype}, {19}, rng);
      auto ops = make_ops(2);
      world.fill_pages(ops);
      Batch batch(world, {{0, 2, 19}});
      batch.forward(ops);
      EXPECT_LT(batch.error(batch.y, &Sequence::y), tolerance(dtype)) << "head_dim " << dim;
      auto sums = zero_accumulators(world);
      batch.backward(ops, sums);
      EXPECT_LT(batch.error(batch.grad_q, &Sequence::grad_q), gradient_tolerance(dtype)) << "head_dim " << dim;
      EXPECT_LT(batch.error(batch.grad_k, &Sequence::grad_k), gradient_tolerance(dtype)) << "head_dim " << dim;
      EXPECT_LT(batch.error(batch.grad_v, &Sequence::grad_v), gradient_tolerance(dtype)) << "head_dim " << dim;
    }
  }
}

TEST(Attention, NoRowsAreLegal) {
  std::mt19937 rng(8);
  auto ops = make_ops(2);
  PagedSequences world({}, {5}, rng);
  for (const auto& pieces : {std::vector<Piece>{}, std::vector<Piece>{{0, 3, 3}, {0, 0, 0}}}) {
    Batch batch(world, pieces);
    batch.forward(ops);
    auto sums = zero_accumulators(world);
    batch.backward(ops, sums);
    EXPECT_EQ(sums, zero_accumulators(world));
  }
}

TEST(Attention, BadArgumentsAreNamed) {
  std::mt19937 rng(9);
  auto ops = make_ops(1);
  PagedSequences world({}, {20}, rng);
  world.fill_pages(ops);
  const auto message = [&](auto&& change) {
    Batch batch(world, {{0, 0, 20}});
    AttentionArgs args{
        head_view(batch.q, 4), world.pages(), batch.spans, head_view(batch.y, 4), batch.lse.view(), 1.0f, 0};
    change(batch, args);
    try {
      ops.run(args);
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string("nothing thrown");
  };
  const auto expect = [&](const char* text, auto&& change) {
    EXPECT_NE(message(change).find(text), std::string::npos) << message(change);
  };
  expect("attention: span of rows [0, 21)", [](Batch& b, auto&) { b.spans[0].row_end = 21; });
  expect("attention: span at position -1", [](Batch& b, auto&) { b.spans[0].position = -1; });
  expect("attention: span without a block table", [](Batch& b, auto&) { b.spans[0].block_table = nullptr; });
  expect("attention: y is float32 [20, 2, 32]", [](Batch& b, auto& args) { args.y = head_view(b.y, 2); });
  expect("attention: lse is float32 [20, 8]", [](Batch& b, auto& args) {
    args.lse = args.lse.reshape({20, 4}), args.lse = TensorView(b.lse.floats(), kF32, {20, 8});
  });
  expect("attention: sliding_window -2", [](Batch&, auto& args) { args.sliding_window = -2; });
  expect("attention: sliding_window 9223372036854775807, wanted 0 to 2147483647",
         [](Batch&, auto& args) { args.sliding_window = std::numeric_limits<std::int64_t>::max(); });
  expect("attention: pages.values is bfloat16", [](Batch&, auto& args) {
    auto& v = args.pages.values;
    v = TensorView(v.data(), kBF16, {v.shape(0), v.shape(1), v.shape(2), v.shape(3)});
  });
  expect("attention: 3 query heads",
         [](Batch& b, auto& args) { args.q = TensorView(b.q.floats(), kF32, {20, 3, 16}); });
  expect("attention: head_dim 12", [](Batch&, auto& args) {
    for (auto* v : {&args.pages.keys, &args.pages.values}) *v = TensorView(v->data(), kF32, {1, 2, 16, 12});
  });
  std::vector<std::int32_t> table{0, -7};
  expect("attention: page -7", [&](Batch& b, auto&) { b.spans[0].block_table = table.data(); });
  table[1] = static_cast<std::int32_t>(world.num_blocks);
  expect("in a block table, wanted pages of [0, 4)", [&](Batch& b, auto&) { b.spans[0].block_table = table.data(); });
}

}  // namespace
}  // namespace flexcore::test
