#include <gtest/gtest.h>

#include <map>
#include <set>
#include <tuple>

#include "parallel/ranks.h"

namespace flexcore {
namespace {

using test::Block;
using test::Ranks;
using test::Sharded;

constexpr std::array kRankCounts = {1, 2, 3, 4, 8};
constexpr std::array<std::array<std::int64_t, 2>, 4> kShapes = {{{7, 24}, {1, 5}, {13, 3}, {16, 16}}};

TEST(ParallelStateTest, SharesCoverAndAreEven) {
  for (const std::int64_t size : {0, 1, 5, 24, 129})
    for (int ranks = 1; ranks <= 8; ++ranks) {
      std::int64_t end = 0;
      for (int r = 0; r < ranks; ++r) {
        const Share share = share_of(size, r, ranks);
        EXPECT_EQ(share.begin, end);
        EXPECT_GE(share.size(), size / ranks);
        EXPECT_LE(share.size(), (size + ranks - 1) / ranks);
        end = share.end;
      }
      EXPECT_EQ(end, size);
      EXPECT_EQ(largest_local_shape(kRowSplit, size, 1, ranks).size(), (size + ranks - 1) / ranks);
    }
}

Sharded any_arrays(const Ranks& ranks, ParallelState state, std::int64_t rows, std::int64_t features,
                   std::mt19937& rng) {
  Sharded x = ranks.zeros(state, rows, features);
  for (auto& block : x.local) block = Block::random(block.rows, block.features, rng);
  return x;
}

double dot(const Sharded& a, const Sharded& b) {
  double sum = 0;
  for (std::size_t r = 0; r < a.local.size(); ++r) sum += test::dot(a.local[r], b.local[r]);
  return sum;
}

TEST(TransitionTest, KeepsTheValue) {
  std::mt19937 rng(1);
  for (const int count : kRankCounts)
    for (const auto& [rows, features] : kShapes)
      for (const auto from : kParallelStates)
        for (const auto to : kParallelStates) {
          Ranks ranks(count);
          const Block whole = Block::random(rows, features, rng);
          const Sharded moved = ranks.move(ranks.scatter(whole, from, rng), to);
          EXPECT_EQ(moved.state, to);
          EXPECT_LT(test::relative_error(ranks.value(moved), whole), 1e-5)
              << tensor_text(from) << " to " << tensor_text(to) << " on " << count;
        }
}

// <T x, y> = <x, T* y>, for whatever the ranks have.
TEST(TransitionTest, AdjointIsTheTransposedMap) {
  std::mt19937 rng(2);
  for (const int count : kRankCounts)
    for (const auto& [rows, features] : kShapes)
      for (const auto from : kParallelStates)
        for (const auto to : kParallelStates) {
          Ranks ranks(count);
          const Transition forward{from, to}, backward = forward.adjoint();
          EXPECT_EQ(backward.adjoint(), forward);
          const Sharded x = any_arrays(ranks, from, rows, features, rng);
          const Sharded moved = ranks.move(x, to);
          Sharded y = any_arrays(ranks, to, rows, features, rng);
          const double left = dot(moved, y);
          y.state = backward.from;  // the same arrays, read as the gradient's
          const Sharded back = ranks.move(y, backward.to);
          EXPECT_NEAR(left, dot(x, back), 1e-4 * static_cast<double>(rows * features))
              << transition_name(forward.kind()) << " and " << transition_name(backward.kind()) << " on " << count;
        }
}

TEST(TransitionTest, NamedAdjoints) {
  const auto adjoint = [](ParallelState from, ParallelState to) { return Transition{from, to}.adjoint().kind(); };
  EXPECT_EQ(adjoint(kRowSplit, kReplicated), TransitionKind::kReduceScatter);
  EXPECT_EQ(adjoint(kPending, kFeatureSplit), TransitionKind::kAllGather);
  EXPECT_EQ(adjoint(kPending, kReplicated), TransitionKind::kAllReduce);
  EXPECT_EQ(adjoint(kAlone, kReplicated), TransitionKind::kReduce);
  EXPECT_EQ(adjoint(kReplicated, kRowSplit), TransitionKind::kPad);
  EXPECT_EQ(adjoint(kRowSplit, kFeatureSplit), TransitionKind::kAllToAll);
}

// The formulas against the messages of the rings, rank by rank.
TEST(TransitionTest, BytesSentAreThoseOfTheMessages) {
  std::mt19937 rng(3);
  for (const int count : kRankCounts)
    for (const auto& [rows, features] : kShapes)
      for (const auto from : kParallelStates)
        for (const auto to : kParallelStates) {
          Ranks ranks(count);
          const Transition transition{from, to};
          ranks.move(ranks.scatter(Block::random(rows, features, rng), from, rng), to, 2);
          std::int64_t most = 0;
          for (int r = 0; r < count; ++r) {
            EXPECT_EQ(ranks.sent[static_cast<std::size_t>(r)], bytes_sent(transition, rows, features, 2, r, count))
                << transition_name(transition.kind()) << " on " << count << ", rank " << r;
            most = std::max(most, ranks.sent[static_cast<std::size_t>(r)]);
          }
          EXPECT_EQ(most, most_bytes_sent(transition, rows, features, 2, count));
          EXPECT_EQ(ranks.collectives, count > 1 && transition.collective() ? 1 : 0);
          EXPECT_EQ(transition.collective() && count > 1, most > 0);
        }
}

TEST(TransitionTest, RingFormulas) {
  const auto bytes = [](ParallelState from, ParallelState to) { return most_bytes_sent({from, to}, 8, 16, 4, 4); };
  const std::int64_t n = 8 * 16 * 4;
  EXPECT_EQ(bytes(kRowSplit, kReplicated), n * 3 / 4);
  EXPECT_EQ(bytes(kPending, kRowSplit), n * 3 / 4);
  EXPECT_EQ(bytes(kPending, kReplicated), 2 * n * 3 / 4);
  EXPECT_EQ(bytes(kRowSplit, kFeatureSplit), n * 3 / 16);
  EXPECT_EQ(bytes(kAlone, kReplicated), n);
  EXPECT_DOUBLE_EQ(bytes_sent_per_row({kPending, kReplicated}, 16, 4, 4), 2 * 16 * 4 * 3 / 4.0);
}

Block product(const Block& a, const Block& b) {  // a b
  Block c(a.rows, b.features);
  for (std::int64_t i = 0; i < c.rows; ++i)
    for (std::int64_t j = 0; j < c.features; ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < a.features; ++k) sum += static_cast<double>(a.at(i, k)) * b.at(k, j);
      c.at(i, j) = static_cast<float>(sum);
    }
  return c;
}

Block times(const Block& a, const Block& b) {
  Block c = a;
  for (std::size_t i = 0; i < c.data.size(); ++i) c.data[i] *= b.data[i];
  return c;
}

// Every pair of states: where a rule gives a state, the ranks' own results are the result in that state; where it gives
// none, they are it in no state.
template <class Rule, class Compute>
void check_rule(Rule rule, Compute compute, std::array<std::int64_t, 2> shape_a, std::array<std::int64_t, 2> shape_b,
                std::size_t legal) {
  std::mt19937 rng(4);
  std::size_t found = 0;
  for (const int count : {2, 3})
    for (const auto a : kParallelStates)
      for (const auto b : kParallelStates) {
        const Ranks ranks(count);
        const Block whole_a = Block::random(shape_a[0], shape_a[1], rng),
                    whole_b = Block::random(shape_b[0], shape_b[1], rng);
        const Block want = compute(whole_a, whole_b);
        const Sharded local_a = ranks.scatter(whole_a, a, rng), local_b = ranks.scatter(whole_b, b, rng);
        const auto said = rule(a, b);
        if ((a == kAlone) != (b == kAlone)) {  // what the other one has of it is taken first, for nothing
          EXPECT_FALSE(said);
          continue;
        }
        found += said.has_value();
        std::set<std::string> right;
        for (const auto state : kParallelStates) {
          Sharded c = ranks.zeros(state, want.rows, want.features);
          bool fits = true;
          for (int r = 0; r < count && fits; ++r) {
            const auto i = static_cast<std::size_t>(r);
            // A rank without elements, or with another inner dimension, computes nothing.
            const Block &x = local_a.local[i], &y = local_b.local[i];
            Block made(c.local[i].rows, c.local[i].features);
            if (!x.data.empty() && !y.data.empty()) {
              try {
                made = compute(x, y);
              } catch (const Error&) {
                fits = false;
              }
            }
            fits = fits && made.rows == c.local[i].rows && made.features == c.local[i].features;
            c.local[i] = std::move(made);
          }
          if (!fits) continue;
          try {
            if (test::relative_error(ranks.value(c), want) < 1e-5) right.insert(tensor_text(state));
          } catch (const Error&) {  // copies that differ
          }
        }
        if (said)
          EXPECT_TRUE(right.contains(tensor_text(*said))) << tensor_text(a) << " " << tensor_text(b);
        else
          EXPECT_TRUE(right.empty()) << tensor_text(a) << " " << tensor_text(b) << " could be " << *right.begin();
      }
  EXPECT_EQ(found, 2 * legal);
}

TEST(ParallelRuleTest, ProductsComputeWhatTheirStateSays) {
  check_rule(
      product_state,
      [](const Block& a, const Block& b) {
        require<Error>(a.features == b.rows, "inner dimensions");
        return product(a, b);
      },
      {11, 7}, {7, 13}, 7);
}

TEST(ParallelRuleTest, ElementwiseProductsToo) {
  check_rule(
      elementwise_state,
      [](const Block& a, const Block& b) {
        require<Error>(a.rows == b.rows && a.features == b.features, "shapes");
        return times(a, b);
      },
      {11, 7}, {11, 7}, 6);
}

// FlexLLM's four rules, and those of the backward that come from the same product.
TEST(ParallelRuleTest, Linears) {
  EXPECT_EQ(LinearRule::y(kReplicated, kReplicated), kReplicated);
  EXPECT_EQ(LinearRule::y(kFeatureSplit, kInSplit), kPending);
  EXPECT_EQ(LinearRule::y(kRowSplit, kReplicated), kRowSplit);
  EXPECT_EQ(LinearRule::y(kReplicated, kOutSplit), kFeatureSplit);
  EXPECT_EQ(LinearRule::y(kPending, kReplicated), kPending);
  EXPECT_EQ(LinearRule::y(kFeatureSplit, kOutSplit), std::nullopt);
  EXPECT_EQ(LinearRule::y(kPending, kInSplit), std::nullopt);

  EXPECT_EQ(LinearRule::grad_x(kFeatureSplit, kOutSplit), kPending);
  EXPECT_EQ(LinearRule::grad_x(kReplicated, kInSplit), kFeatureSplit);
  EXPECT_EQ(LinearRule::grad_w(kRowSplit, kRowSplit), kPending);
  EXPECT_EQ(LinearRule::grad_w(kFeatureSplit, kReplicated), kOutSplit);
  EXPECT_EQ(LinearRule::grad_w(kReplicated, kFeatureSplit), kInSplit);
  EXPECT_EQ(LinearRule::grad_w(kPending, kPending), std::nullopt);
}

TEST(ParallelRuleTest, AFunctionOfASumIsNotLegal) {
  EXPECT_EQ(ActivationRule::y(kPending), std::nullopt);
  EXPECT_EQ(ActivationRule::y(kFeatureSplit), kFeatureSplit);
  EXPECT_EQ(ActivationRule::grad_x(kPending, kReplicated), kPending);
  EXPECT_EQ(ActivationRule::grad_x(kPending, kFeatureSplit), std::nullopt);
}

TEST(ParallelRuleTest, VectorsLieAsTheFeatures) {
  EXPECT_EQ(VectorRule::y(kRowSplit, kReplicated), kRowSplit);
  EXPECT_EQ(VectorRule::y(kFeatureSplit, kFeatureSplit), kFeatureSplit);
  EXPECT_EQ(VectorRule::y(kRowSplit, kFeatureSplit), std::nullopt);
  EXPECT_EQ(VectorRule::y(kPending, kReplicated), kPending);
  EXPECT_EQ(VectorRule::grad_w(kRowSplit, kRowSplit), kPending);
  EXPECT_EQ(VectorRule::grad_w(kFeatureSplit, kFeatureSplit), kFeatureSplit);
}

}  // namespace
}  // namespace flexcore
