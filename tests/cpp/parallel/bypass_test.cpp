#include <gtest/gtest.h>

#include <map>
#include <set>

#include "parallel/bypass_run.h"

namespace flexcore {
namespace {

using test::Block;
using test::BypassRun;
using test::Ranks;
using test::relative_error;
using test::Sharded;

using Kind = BypassStep::Kind;

BypassForm lora(std::int64_t in, std::int64_t out, std::int64_t rank) {
  return {{{Kind::kLinear, "A", in, rank}, {Kind::kLinear, "B", rank, out}}};
}
BypassForm bottleneck(std::int64_t in, std::int64_t out, std::int64_t rank) {
  return {
      {{Kind::kLinear, "down", in, rank}, {Kind::kActivation, "relu", rank, rank}, {Kind::kLinear, "up", rank, out}}};
}
BypassForm vector(std::int64_t features) { return {{{Kind::kVector, "l", features, features}}}; }

// As the backbones of parallel_backbone.h have them; which sites are which is tested there.
const std::map<std::string, SiteStates> kSites = {
    {"column", {kOutSplit, {kReplicated}, {kFeatureSplit}, {kFeatureSplit}, {kPending, kReplicated}}},
    {"row", {kInSplit, {kFeatureSplit}, {kPending, kReplicated}, {kReplicated}, {kFeatureSplit}}},
    {"copied heads", {kReplicated, {kReplicated}, {kReplicated}, {kPending}, {kPending, kReplicated}}},
    {"column, split residual",
     {kOutSplit, {kRowSplit, kReplicated}, {kFeatureSplit}, {kFeatureSplit}, {kPending, kRowSplit}}},
    {"row, split residual",
     {kInSplit, {kFeatureSplit}, {kPending, kRowSplit}, {kRowSplit, kReplicated}, {kFeatureSplit}}},
};

std::vector<Block> random_weights(const BypassForm& form, std::mt19937& rng) {
  std::vector<Block> weights;
  for (const auto& step : form.steps)
    weights.push_back(step.kind == Kind::kLinear   ? Block::random(step.out_features, step.in_features, rng)
                      : step.kind == Kind::kVector ? Block::random(1, step.in_features, rng)
                                                   : Block());
  return weights;
}

struct Outcome {
  Block y, grad_x;
  std::vector<Block> gradients;
};

Outcome run(Ranks& ranks, BypassRun& bypass, const Block& x, const Block& grad_y, std::mt19937& rng) {
  const auto& plan = bypass.plan();
  Outcome out;
  out.y = ranks.value(bypass.forward(ranks.scatter(x, plan.read, rng)));
  out.grad_x = ranks.value(bypass.backward(ranks.scatter(grad_y, plan.grad_read, rng)));
  out.gradients = bypass.gradients();
  return out;
}

double worst_error(const Outcome& got, const Outcome& want) {
  double worst = std::max(relative_error(got.y, want.y), relative_error(got.grad_x, want.grad_x));
  for (std::size_t i = 0; i < got.gradients.size(); ++i)
    if (!want.gradients[i].data.empty()) worst = std::max(worst, relative_error(got.gradients[i], want.gradients[i]));
  return worst;
}

constexpr std::int64_t kTokens = 7;

// Every candidate computes what one rank computes, and sends what its plan says, rank by rank.
void check_all(const BypassForm& form, const SiteStates& site, int count, std::size_t at_least) {
  std::mt19937 rng(11);
  const auto weights = random_weights(form, rng);
  const Block x = Block::random(kTokens, form.steps.front().in_features, rng),
              grad_y = Block::random(kTokens, form.steps.back().out_features, rng);
  const BypassSizes sizes{.tokens = kTokens, .tokens_per_step = kTokens, .x_bytes = 4, .y_bytes = 2};
  const auto plans = enumerate_plans(form, site);
  EXPECT_GE(plans.size(), at_least);
  Ranks one(1);
  BypassRun alone(one, form, plans.front(), sizes, weights);
  const Outcome want = run(one, alone, x, grad_y, rng);
  std::set<std::string> seen;
  for (const auto& plan : plans) {
    Ranks ranks(count);
    BypassRun bypass(ranks, form, plan, sizes, weights);
    ASSERT_LT(worst_error(run(ranks, bypass, x, grad_y, rng), want), 2e-5) << summary(form, plan) << " on " << count;
    for (int r = 0; r < count; ++r)
      ASSERT_EQ(ranks.sent[static_cast<std::size_t>(r)], bypass.planned_bytes(r)) << summary(form, plan) << ", " << r;
    const int claimed = cost_of(form, plan, sizes, count, {}).collectives;
    EXPECT_LE(claimed, ranks.collectives);
  }
}

TEST(BypassPlanTest, EveryCandidateOfALora) {
  for (const auto& [name, site] : kSites) {
    SCOPED_TRACE(name);
    for (const int count : {1, 2, 3, 4, 8}) check_all(lora(20, 28, 5), site, count, 800);
  }
}

TEST(BypassPlanTest, EveryCandidateOfABottleneck) {
  for (const auto& [name, site] : kSites) {
    SCOPED_TRACE(name);
    for (const int count : {2, 3}) check_all(bottleneck(10, 9, 5), site, count, 1000);
  }
}

TEST(BypassPlanTest, EveryCandidateOfAVector) {
  const SiteStates heads{kOutSplit, {kFeatureSplit}, {kFeatureSplit}, {kFeatureSplit}, {kFeatureSplit}};
  for (const int count : {1, 2, 3, 4, 8}) {
    check_all(vector(24), heads, count, 5);
    check_all(vector(24), kSites.at("row"), count, 5);
  }
}

}  // namespace
}  // namespace flexcore
