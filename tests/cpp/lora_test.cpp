#include "ops/lora.h"

#include <gtest/gtest.h>

#include <list>

#include "op_fixture.h"

namespace flexcore::test {
namespace {

/// Adapters of one module and the segments that use them.
class Adapters {
 public:
  Adapters(std::int64_t in, std::int64_t out, std::mt19937& rng) : in_(in), out_(out), rng_(rng) {}

  void add(std::int64_t begin, std::int64_t end, std::int64_t rank, float scaling) {
    auto& a = matrices_.emplace_back(Matrix::random(DType::kFloat32, rank, in_, rng_));
    auto& b = matrices_.emplace_back(Matrix::random(DType::kFloat32, out_, rank, rng_));
    auto& grad_a = matrices_.emplace_back(Matrix::random(DType::kFloat32, rank, in_, rng_));
    auto& grad_b = matrices_.emplace_back(Matrix::random(DType::kFloat32, out_, rank, rng_));
    segments_.push_back({begin, end, a.floats(), b.floats(), rank, scaling, grad_a.floats(), grad_b.floats()});
  }
  /// The last segment's adapter once more, on other rows.
  void share(std::int64_t begin, std::int64_t end) {
    segments_.push_back(segments_.back());
    segments_.back().begin = begin, segments_.back().end = end;
  }
  std::vector<LoraSegment>& segments() { return segments_; }
  /// The matrices, in the order a, b, grad_a, grad_b of each adapter.
  std::list<Matrix>& matrices() { return matrices_; }

 private:
  std::int64_t in_, out_;
  std::mt19937& rng_;
  std::list<Matrix> matrices_;
  std::vector<LoraSegment> segments_;
};

OpFixture& fixture() {
  static OpFixture ops(2);
  return ops;
}

/// x A^T of one segment, in double: [rows][rank].
std::vector<double> shrink(const Matrix& x, const LoraSegment& s) {
  std::vector<double> u((s.end - s.begin) * s.rank);
  for (std::int64_t i = s.begin; i < s.end; ++i)
    for (std::int64_t r = 0; r < s.rank; ++r)
      for (std::int64_t k = 0; k < x.width(); ++k)
        u[(i - s.begin) * s.rank + r] += x(i, k) * s.lora_a[r * x.width() + k];
  return u;
}

/// grad_y B of one segment.
std::vector<double> shrink_gradient(const Matrix& g, const LoraSegment& s) {
  std::vector<double> du((s.end - s.begin) * s.rank);
  for (std::int64_t i = s.begin; i < s.end; ++i)
    for (std::int64_t o = 0; o < g.width(); ++o)
      for (std::int64_t r = 0; r < s.rank; ++r) du[(i - s.begin) * s.rank + r] += g(i, o) * s.lora_b[o * s.rank + r];
  return du;
}

using Values = std::vector<double>;  // row-major

Values values(const Matrix& m) {
  Values v;
  for (std::int64_t i = 0; i < m.rows(); ++i)
    for (std::int64_t j = 0; j < m.width(); ++j) v.push_back(m(i, j));
  return v;
}

/// |got - wanted| over |wanted|, as norms of the whole tensor.
double norm_error(const Matrix& got, const Values& wanted) {
  const auto g = values(got);
  double error = 0, norm = 1e-30;
  for (std::size_t i = 0; i < g.size(); ++i)
    error += (g[i] - wanted[i]) * (g[i] - wanted[i]), norm += wanted[i] * wanted[i];
  return std::isnan(error) ? 1e30 : std::sqrt(error / norm);
}

void expand(const std::vector<double>& u, const LoraSegment& s, std::int64_t width, Values& y) {
  for (std::int64_t i = s.begin; i < s.end; ++i)
    for (std::int64_t o = 0; o < width; ++o)
      for (std::int64_t r = 0; r < s.rank; ++r)
        y[i * width + o] += s.scaling * u[(i - s.begin) * s.rank + r] * s.lora_b[o * s.rank + r];
}

struct Case {
  std::int64_t rows, in;
  std::vector<std::int64_t> outs;
};
const Case kCases[] = {
    {1, 64, {64, 17}}, {7, 33, {5, 40, 1}}, {23, 800, {96}}, {130, 48, {31, 64, 64}}, {300, 96, {80, 33}}};

// Members with different segments, ranks and gaps, adapters that come twice.
std::list<Adapters> adapters_for(const Case& c, std::mt19937& rng) {
  std::list<Adapters> all;
  const std::int64_t ranks[] = {16, 1, 5, 8, 33, 64, 256};
  int next = rng() % 7;
  for (std::size_t m = 0; m < c.outs.size(); ++m) {
    auto& adapters = all.emplace_back(c.in, c.outs[m], rng);
    const std::int64_t third = c.rows / 3;
    adapters.add(0, c.rows == 1 ? 1 : third, ranks[next++ % 7], 0.5f);
    if (c.rows == 1) continue;
    if (m != 1) adapters.add(third, third + 1, ranks[next++ % 7], 2.0f);
    adapters.add(third + 1, 2 * third, ranks[next++ % 7], 1.5f);
    adapters.share(2 * third, c.rows - 1);
    adapters.add(c.rows - 1, c.rows - 1, 4, 1.0f);  // no rows
  }
  return all;
}

// What the numbers of one call may lose. With bfloat16 among the activations, CUDA multiplies float32 operands as two
// bfloat16 numbers that keep 16 bits.
double allowed_error(const Matrix& x, const std::vector<Matrix>& others) {
  bool exact = on_cpu() || x.dtype() == DType::kFloat32;
  for (const auto& m : others) exact = exact && (on_cpu() || m.dtype() == DType::kFloat32);
  return exact ? 2e-6 : 3e-5;
}

void expect_forward(Matrix& x, std::list<Adapters>& adapters, std::vector<Matrix>& ys) {
  std::vector<LoraArgs::Member> members;
  std::vector<Values> wanted;
  const double allowed = allowed_error(x, ys);
  auto y = ys.begin();
  for (auto& a : adapters) {
    wanted.push_back(values(*y));
    for (const auto& s : a.segments()) expand(shrink(x, s), s, y->width(), wanted.back());
    members.push_back({y++->view(), a.segments()});
  }
  fixture().run(LoraArgs{x.view(), members});
  for (std::size_t m = 0; m < ys.size(); ++m) {
    EXPECT_LE(norm_error(ys[m], wanted[m]), ys[m].dtype() == DType::kBFloat16 ? epsilon(ys[m].dtype()) : allowed)
        << x.rows() << " rows, member " << m;
    EXPECT_TRUE(ys[m].gaps_untouched());
  }
}

void expect_backward(Matrix& x, std::list<Adapters>& adapters, std::vector<Matrix>& grads, Matrix* grad_x) {
  std::vector<LoraBackwardArgs::Member> members;
  Values wanted_x(static_cast<std::size_t>(x.rows() * x.width()));
  if (grad_x != nullptr) wanted_x = values(*grad_x);
  std::vector<std::pair<float*, Values>> wanted;  // of every grad_a and grad_b
  const auto find = [&](float* p) -> Values& {
    for (auto& [key, value] : wanted)
      if (key == p) return value;
    throw std::logic_error("unknown gradient");
  };
  auto g = grads.begin();
  for (auto& a : adapters) {
    for (auto& m : a.matrices()) wanted.emplace_back(m.floats(), values(m));
    for (const auto& s : a.segments()) {
      const auto u = shrink(x, s), du = shrink_gradient(*g, s);
      auto &grad_a = find(s.grad_a), &grad_b = find(s.grad_b);
      for (std::int64_t i = s.begin; i < s.end; ++i)
        for (std::int64_t r = 0; r < s.rank; ++r) {
          const double ur = s.scaling * u[(i - s.begin) * s.rank + r];
          const double dr = s.scaling * du[(i - s.begin) * s.rank + r];
          for (std::int64_t k = 0; k < x.width(); ++k) {
            wanted_x[i * x.width() + k] += dr * s.lora_a[r * x.width() + k];
            grad_a[r * x.width() + k] += dr * x(i, k);
          }
          for (std::int64_t o = 0; o < g->width(); ++o) grad_b[o * s.rank + r] += ur * (*g)(i, o);
        }
    }
    members.push_back({g++->view(), a.segments()});
  }
  fixture().run(LoraBackwardArgs{x.view(), members, grad_x != nullptr ? grad_x->view() : TensorView()});
  const double allowed = allowed_error(x, grads);
  if (grad_x != nullptr) {
    EXPECT_LE(norm_error(*grad_x, wanted_x), allowed) << x.rows() << " rows";
    EXPECT_TRUE(grad_x->gaps_untouched());
  }
  for (auto& a : adapters)
    for (auto& m : a.matrices()) EXPECT_LE(norm_error(m, find(m.floats())), allowed) << x.rows() << " rows";
}

TEST(Lora, ForwardMatchesOracle) {
  std::mt19937 rng(1);
  for (const auto& c : kCases)
    for (const auto x_type : kFloats)
      for (const auto y_type : kFloats) {
        auto x = Matrix::random(x_type, c.rows, c.in, rng, 1.0f, 3);
        auto adapters = adapters_for(c, rng);
        std::vector<Matrix> ys;
        for (const auto out : c.outs) ys.push_back(Matrix::random(y_type, c.rows, out, rng, 1.0f, 5));
        expect_forward(x, adapters, ys);
      }
}

TEST(Lora, BackwardMatchesOracle) {
  std::mt19937 rng(2);
  for (const auto& c : kCases)
    for (const auto x_type : kFloats)
      for (const auto g_type : kFloats)
        for (const bool with_grad_x : {true, false}) {
          auto x = Matrix::random(x_type, c.rows, c.in, rng, 1.0f, 1);
          auto grad_x = Matrix::random(DType::kFloat32, c.rows, c.in, rng, 1.0f, 2);
          auto adapters = adapters_for(c, rng);
          std::vector<Matrix> grads;
          for (const auto out : c.outs) grads.push_back(Matrix::random(g_type, c.rows, out, rng, 1.0f, 4));
          expect_backward(x, adapters, grads, with_grad_x ? &grad_x : nullptr);
        }
}

/// Rows, widths and gaps that allow vectors and asynchronous copies everywhere; every member the same segments.
struct EvenCase {
  std::int64_t in;
  std::vector<std::int64_t> outs;
  struct Segment {
    std::int64_t rows, rank;  // rank 0: rows without an adapter; -1: the adapter before once more
  };
  std::vector<Segment> segments;

  std::int64_t rows() const {
    std::int64_t sum = 0;
    for (const auto& s : segments) sum += s.rows;
    return sum;
  }
  std::list<Adapters> adapters(std::mt19937& rng) const {
    std::list<Adapters> all;
    for (const auto out : outs) {
      auto& member = all.emplace_back(in, out, rng);
      std::int64_t row = 0;
      for (const auto& [rows, rank] : segments) {
        if (rank > 0) member.add(row, row + rows, rank, 0.25f + 0.5f * static_cast<float>(rank % 3));
        if (rank < 0) member.share(row, row + rows);
        row += rows;
      }
    }
    return all;
  }
  // `mixed`: the members' dtypes differ.
  void expect(DType x_type, DType type, bool mixed, bool backward, std::mt19937& rng) const {
    auto x = Matrix::random(x_type, rows(), in, rng, 1.0f, 8);
    std::vector<Matrix> others;
    for (const auto out : outs)
      others.push_back(Matrix::random(mixed ? kFloats[others.size() % 2] : type, rows(), out, rng, 1.0f, 8));
    auto all = adapters(rng);
    if (!backward) return expect_forward(x, all, others);
    auto grad_x = Matrix::random(DType::kFloat32, rows(), in, rng, 1.0f, 8);
    expect_backward(x, all, others, &grad_x);
  }
};

// Every rank in tiles and, one row each, in vectors; one row wider than a block takes; few rows of many features; more
// ranks than one pass adds to grad_x; chunks of rows of adapters that come back.
TEST(Lora, EveryWayThroughTheKernels) {
  std::mt19937 rng(6);
  const std::vector<EvenCase> cases = {
      {192, {136}, {{40, 16}, {1, 0}, {3, 3}, {65, 64}, {4, 256}}},
      {128, {64, 72}, {{1, 1}, {1, 3}, {1, 16}, {1, 64}, {1, 256}, {33, 1}, {34, 3}}},
      {2304, {40}, {{1, 16}}},
      {1600, {520}, {{20, 24}}},
      {64, {72, 64, 64}, {{5, 256}, {70, 200}}},
      {136, {64, 128}, {{150, 8}, {140, 12}, {2, 0}, {130, -1}, {1, 6}, {129, -1}}},
  };
  for (const auto& c : cases)
    for (const auto x_type : kFloats)
      for (const bool backward : {false, true}) {
        for (const auto type : kFloats) c.expect(x_type, type, false, backward, rng);
        if (c.outs.size() > 1) c.expect(x_type, x_type, true, backward, rng);
      }
}

// A decode batch: as many adapters as rows, and one that finetunes beside them.
TEST(Lora, SixtyFourAdapters) {
  std::mt19937 rng(7);
  EvenCase c{136, {64, 32}, {}};
  for (std::int64_t i = 0; i < 64; ++i) c.segments.push_back({i % 9 == 0 ? 2 : 1, i % 5 == 0 ? 3 : 16});
  c.segments.push_back({90, 32});
  for (const auto type : kFloats)
    for (const bool backward : {false, true}) c.expect(type, type, false, backward, rng);
}

// Every kind of rank in one call, a few rows each; some adapters have none. One row of rank 1 is a single number, whose
// relative error has no bound.
TEST(Lora, SixtyFourAdaptersOfMixedRanks) {
  std::mt19937 rng(9);
  constexpr std::int64_t kRanks[] = {1, 256, 2, 3, 5, 8, 200, 16, 17, 33, 64, 100, 128};
  EvenCase c{72, {64, 40}, {}};
  for (std::int64_t i = 0; i < 64; ++i) {
    const std::int64_t rank = kRanks[i % 13];
    c.segments.push_back({i % 7 == 3 ? 0 : i % 11 == 5 ? 20 : rank < 4 ? 3 : 1 + i % 3, rank});
  }
  for (const auto x_type : kFloats)
    for (const auto type : kFloats)
      for (const bool backward : {false, true}) c.expect(x_type, type, false, backward, rng);
}

TEST(Lora, FeaturesMayBeAnyMultipleOfEight) {
  std::mt19937 rng(10);
  const auto expect = [&](std::int64_t in, std::int64_t out) {
    const EvenCase c{in, {out}, {{18, 8}, {1, 16}, {1, 3}}};
    for (const auto type : kFloats)
      for (const bool backward : {false, true}) c.expect(type, type, false, backward, rng);
  };
  for (std::int64_t i = 1; i <= 32; ++i) expect(8 * i, 8 * (33 - i));
  for (const std::int64_t large : {1000, 2056, 4104}) expect(large, 24), expect(40, large);
}

// Adapters may lie anywhere: matrices that are not aligned to a vector.
TEST(Lora, UnalignedAdapters) {
  std::mt19937 rng(8);
  constexpr std::int64_t kRows = 50, kIn = 64, kOut = 72, kRank = 8;
  for (const auto type : kFloats)
    for (const std::int64_t rows : {kRows, std::int64_t{2}}) {
      auto x = Matrix::random(type, rows, kIn, rng), y = Matrix::random(type, rows, kOut, rng);
      auto a = Matrix::random(DType::kFloat32, kRank, kIn, rng), b = Matrix::random(DType::kFloat32, kOut, kRank, rng);
      auto shifted = Matrix::random(DType::kFloat32, 1, kRank * (kIn + kOut) + 2, rng);
      float* const a_shifted = shifted.floats() + 1;
      float* const b_shifted = a_shifted + kRank * kIn + 1;
      std::copy_n(a.floats(), kRank * kIn, a_shifted);
      std::copy_n(b.floats(), kRank * kOut, b_shifted);
      auto expected = y;
      const std::vector<LoraSegment> even = {{0, rows, a.floats(), b.floats(), kRank, 1.5f}};
      const std::vector<LoraSegment> odd = {{0, rows, a_shifted, b_shifted, kRank, 1.5f}};
      const std::vector<LoraArgs::Member> even_member = {{expected.view(), even}}, odd_member = {{y.view(), odd}};
      fixture().run(LoraArgs{x.view(), even_member});
      fixture().run(LoraArgs{x.view(), odd_member});
      EXPECT_LE(norm_error(y, values(expected)), epsilon(type));
    }
}

// The same bits for a row alone and in a batch, and for one and three threads. On CUDA sums are divided by how many
// rows there are, so bits are the same for the same batch only.
TEST(Lora, ForwardRowsDoNotSeeTheirBatch) {
  std::mt19937 rng(3);
  constexpr std::int64_t kIn = 1600;
  const std::int64_t kRows = emulated() ? 40 : 200;
  OpFixture one(1), three(3);
  for (const auto type : kFloats)
    for (const std::int64_t rank : {1, 7, 8, 16, 40}) {
      auto x = Matrix::random(type, kRows, kIn, rng);
      Adapters q(kIn, 100, rng), v(kIn, 36, rng);
      q.add(0, kRows, rank, 0.7f), v.add(0, kRows, rank, 1.3f);
      const auto y = Matrix::random(type, kRows, 100, rng), z = Matrix::random(type, kRows, 36, rng);
      auto together_y = y, together_z = z, alone_y = y, alone_z = z, again_y = y, again_z = z;
      const std::vector<LoraArgs::Member> all = {{together_y.view(), q.segments()}, {together_z.view(), v.segments()}};
      three.run(LoraArgs{x.view(), all});
      const std::vector<LoraArgs::Member> again = {{again_y.view(), q.segments()}, {again_z.view(), v.segments()}};
      one.run(LoraArgs{x.view(), again});
      EXPECT_TRUE(together_y.same(again_y) && together_z.same(again_z)) << "rank " << rank;
      for (std::int64_t i = 0; i < kRows; ++i) {
        q.segments()[0].begin = v.segments()[0].begin = 0;
        q.segments()[0].end = v.segments()[0].end = 1;
        const std::vector<LoraArgs::Member> single = {{alone_y.view().rows(i, i + 1), q.segments()},
                                                      {alone_z.view().rows(i, i + 1), v.segments()}};
        (i % 2 ? one : three).run(LoraArgs{x.view().rows(i, i + 1), single});
      }
      if (on_cpu()) {
        EXPECT_TRUE(together_y.same(alone_y)) << "rank " << rank;
        EXPECT_TRUE(together_z.same(alone_z)) << "rank " << rank;
      }
      EXPECT_LE(norm_error(together_y, values(alone_y)), epsilon(type)) << "rank " << rank;
      EXPECT_LE(norm_error(together_z, values(alone_z)), epsilon(type)) << "rank " << rank;
    }
}

TEST(Lora, GradientsDoNotDependOnThreads) {
  constexpr std::int64_t kRows = 333, kIn = 200, kOut = 150;
  std::vector<std::vector<Values>> results;
  for (const int threads : {1, 2, 5}) {
    std::mt19937 rng(4);
    OpFixture ops(threads);
    auto x = Matrix::random(DType::kBFloat16, kRows, kIn, rng), g = Matrix::random(DType::kFloat32, kRows, kOut, rng);
    auto grad_x = Matrix::random(DType::kFloat32, kRows, kIn, rng);
    Adapters a(kIn, kOut, rng), b(kIn, kOut, rng);
    a.add(0, 100, 16, 1.0f), a.share(100, 300), b.add(50, kRows, 12, 0.3f);
    const std::vector<LoraBackwardArgs::Member> members = {{g.view(), a.segments()}, {g.view(), b.segments()}};
    ops.run(LoraBackwardArgs{x.view(), members, grad_x.view()});
    auto& result = results.emplace_back(1, values(grad_x));
    for (auto* adapters : {&a, &b})
      for (const auto& m : adapters->matrices()) result.push_back(values(m));
  }
  EXPECT_EQ(results[0], results[1]);
  EXPECT_EQ(results[0], results[2]);
}

// Of an output layer whose gradients are there already: the input's is the same, and nothing else is written.
TEST(Lora, GradientsOfSomeSegmentsAreNotWanted) {
  constexpr std::int64_t kRows = 90, kIn = 72, kOut = 40;
  std::mt19937 rng(8);
  for (const auto type : kFloats) {
    auto x = Matrix::random(type, kRows, kIn, rng), g = Matrix::random(DType::kFloat32, kRows, kOut, rng);
    Adapters a(kIn, kOut, rng);
    a.add(0, 30, 16, 1.0f), a.add(30, 70, 5, 0.5f), a.add(75, kRows, 24, 2.0f);
    auto grad_x = Matrix::random(DType::kFloat32, kRows, kIn, rng), other = grad_x;
    const std::list<Matrix> before = a.matrices();
    std::list<Matrix> wanted;
    for (const bool all : {true, false}) {
      if (!all) {
        wanted = a.matrices();
        auto from = before.begin();
        for (auto& matrix : a.matrices()) {
          for (std::int64_t i = 0; i < matrix.rows(); ++i)
            for (std::int64_t j = 0; j < matrix.width(); ++j) matrix.set(i, j, static_cast<float>((*from)(i, j)));
          ++from;
        }
        a.segments()[1].grad_a = a.segments()[1].grad_b = nullptr;
      }
      const LoraBackwardArgs::Member member{g.view(), a.segments()};
      fixture().run(LoraBackwardArgs{x.view(), {&member, 1}, all ? grad_x.view() : other.view()});
    }
    EXPECT_TRUE(other.same(grad_x));
    std::size_t i = 0;
    for (const auto& got : a.matrices()) {
      const bool untouched = i / 4 == 1;
      const Matrix& expected = *std::next((untouched ? before : wanted).begin(), static_cast<std::ptrdiff_t>(i));
      EXPECT_LE(worst_error(got, expected), untouched ? 0.0 : 1e-5) << i;
      ++i;
    }
  }
}

TEST(Lora, NothingToDoAndBadArguments) {
  std::mt19937 rng(5);
  auto x = Matrix::random(DType::kFloat32, 4, 8, rng), y = Matrix::random(DType::kFloat32, 4, 6, rng);
  const auto before = y;
  fixture().run(LoraArgs{x.view(), {}});
  std::vector<LoraArgs::Member> members = {{y.view(), {}}};
  fixture().run(LoraArgs{x.view(), members});
  EXPECT_TRUE(y.same(before));

  Adapters a(8, 6, rng);
  a.add(0, 4, 4, 1.0f);
  members[0].segments = a.segments();
  const auto message = [&]() -> std::string {
    try {
      fixture().run(LoraArgs{x.view(), members});
    } catch (const InvalidArgument& error) {
      return error.what();
    }
    return "no error";
  };
  a.segments()[0].rank = 257;
  EXPECT_EQ(message(), "lora_forward: member 0 segment 0 has rank 257, wanted 1 to 256");
  a.segments()[0].rank = 4, a.segments()[0].end = 5;
  EXPECT_NE(message().find("is rows [0, 5), wanted ascending disjoint rows in [0, 4)"), std::string::npos);
  a.segments()[0].end = 4, a.segments()[0].lora_b = nullptr;
  EXPECT_NE(message().find("has no lora_a or no lora_b"), std::string::npos);
}

}  // namespace
}  // namespace flexcore::test
