#include <gtest/gtest.h>

#include <limits>
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
  for (const auto& plan : plans) {
    Ranks ranks(count);
    BypassRun bypass(ranks, form, plan, sizes, weights);
    ASSERT_LT(worst_error(run(ranks, bypass, x, grad_y, rng), want), 2e-5) << summary(form, plan) << " on " << count;
    for (int r = 0; r < count; ++r)
      ASSERT_EQ(ranks.sent[static_cast<std::size_t>(r)], bypass.planned_bytes(r, kTokens))
          << summary(form, plan) << ", " << r;
    std::int64_t claimed = 0;
    for (const auto& moved : transitions(form, plan, sizes)) claimed += count > 1 && moved.transition.collective();
    ASSERT_EQ(ranks.collectives, claimed) << summary(form, plan);
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
    check_all(vector(24), {kReplicated, {kReplicated}, {kReplicated}, {kPending}, {kPending}}, count, 5);
    check_all(vector(24), kSites.at("row"), count, 5);
  }
}

const BypassSizes kLlama{.tokens = 512, .tokens_per_step = 8192, .x_bytes = 2, .y_bytes = 4};

const BypassCandidate* find(const BypassChoice& choice, const BypassForm& form, const std::string& text) {
  for (const auto& candidate : choice.candidates)
    if (summary(form, candidate.plan) == text) return &candidate;
  return nullptr;
}

// Of a linear that is split over in, the bypass joins the sum before the base's all-reduce, which then is of both.
TEST(BypassChoiceTest, ARowSplitLoraSharesTheBasesAllReduce) {
  const BypassForm form = lora(14336, 4096, 16);
  for (const int ranks : {2, 4, 8}) {
    const auto choice = choose_plan(form, kSites.at("row"), kLlama, ranks, {});
    const auto& best = choice.best();
    EXPECT_EQ(summary(form, best.plan), "x|k A|in u+ B= y+, back y= u= x|k");
    EXPECT_EQ(best.cost.collectives, 0);
    EXPECT_EQ(best.cost.forward_bytes + best.cost.backward_bytes, 0);
    EXPECT_EQ(best.cost.step_bytes, 2 * 4096 * 16 * 4 * (ranks - 1) / ranks);  // grad B, summed
    EXPECT_EQ(explain(form, kSites.at("row"), best.plan),
              "A split over in; u left a sum; B whole on every rank; y joins the linear's own sum before its "
              "all-reduce; grad B by all-reduce once an optimizer step");
  }
}

// What others do is among the candidates: S-LoRA's (arXiv 2311.03285, section 6) splits every adapter matrix, at the
// price of moving u; it is the choice where collectives begin at once.
TEST(BypassChoiceTest, FullySplitAdaptersWhereCollectivesBeginAtOnce) {
  const std::map<std::string, std::string> wanted = {{"column", "x= A|out u|k>= B|out y|k, back y|k u+>|k x+"},
                                                     {"row", "x|k A|in u+>|k B|in y+, back y= u|k>= x|k"}};
  for (const auto& [name, text] : wanted) {
    const BypassForm form = lora(4096, 4096, 16);
    const auto choice = choose_plan(form, kSites.at(name), kLlama, 4, {.collective_seconds = 0});
    EXPECT_EQ(summary(form, choice.best().plan), text);
    EXPECT_EQ(choice.best().cost.parameter_bytes, 2 * 4096 * 16 * 4 / 4);
    EXPECT_DOUBLE_EQ(choice.best().cost.forward_bytes, 16 * 4 * 3 / 4.0);
    const auto late = choose_plan(form, kSites.at(name), kLlama, 4, {});
    EXPECT_NE(summary(form, late.best().plan), text);
    ASSERT_NE(find(late, form, text), nullptr);
    EXPECT_EQ(find(late, form, text)->dominated_by, -1);  // it takes least memory
  }
}

TEST(BypassChoiceTest, WhatIsLeftOutIsNoBetterThanSomethingKept) {
  for (const auto& [name, site] : kSites) {
    const BypassForm form = lora(4096, 1024, 16);
    const auto choice = choose_plan(form, site, kLlama, 4, {});
    int kept = 0;
    std::set<std::string> texts;
    for (const auto& candidate : choice.candidates) {
      EXPECT_TRUE(texts.insert(summary(form, candidate.plan)).second) << "twice: " << summary(form, candidate.plan);
      EXPECT_GE(candidate.cost.seconds, choice.best().cost.seconds * (1 - 1e-12));
      if (candidate.dominated_by < 0) {
        ++kept;
        EXPECT_TRUE(candidate.reason.empty());
        continue;
      }
      const auto& by = choice.candidates[static_cast<std::size_t>(candidate.dominated_by)];
      EXPECT_EQ(by.dominated_by, -1);
      EXPECT_LE(by.cost.forward_seconds, candidate.cost.forward_seconds * (1 + 1e-12));
      EXPECT_LE(by.cost.backward_seconds, candidate.cost.backward_seconds * (1 + 1e-12));
      EXPECT_LE(by.cost.step_seconds, candidate.cost.step_seconds * (1 + 1e-12));
      EXPECT_LE(by.cost.memory_bytes, candidate.cost.memory_bytes * (1 + 1e-12));
      EXPECT_TRUE(candidate.reason.ends_with(summary(form, by.plan))) << candidate.reason;
      EXPECT_EQ(candidate.equal, candidate.reason.starts_with("costs the same as ")) << candidate.reason;
    }
    EXPECT_EQ(kept, choice.kept);
    EXPECT_EQ(choice.best().dominated_by, -1);
  }
}

TEST(BypassChoiceTest, MemoryBreaksTies) {
  constexpr double kAtOnce = std::numeric_limits<double>::infinity();
  for (const auto& [name, site] : kSites) {
    const auto choice = choose_plan(lora(4096, 1024, 16), site, kLlama, 4, {kAtOnce, kAtOnce, kAtOnce, 0});
    for (const auto& candidate : choice.candidates)
      EXPECT_GE(candidate.cost.memory_bytes, choice.best().cost.memory_bytes);
    EXPECT_EQ(choice.kept, 1);
  }
}

// The strict adjoint of a forward, transition by transition, is one of its backwards: none is missed.
TEST(BypassChoiceTest, TheAdjointIsAmongTheBackwards) {
  const BypassForm form = lora(64, 48, 4);
  for (const auto& [name, site] : kSites) {
    std::set<std::string> forwards, with_adjoint;
    for (const auto& plan : enumerate_plans(form, site)) {
      const auto text = summary(form, plan);
      const auto forward = text.substr(0, text.find(", back"));
      forwards.insert(forward);
      const auto dual = [](ParallelState state) {
        return state == kReplicated ? kPending : state == kPending ? kReplicated : state;
      };
      const auto matches = [&](ParallelState got, ParallelState state) {
        return got == dual(state) || (state == kReplicated && got == kReplicated);  // a whole gradient needs no sum
      };
      bool adjoint = true;
      for (const auto& step : plan.steps) adjoint = adjoint && matches(step.grad_y, step.y);
      if (adjoint) with_adjoint.insert(forward);
    }
    EXPECT_EQ(forwards, with_adjoint) << name;
  }
}

TEST(BypassChoiceTest, NoActivationReadsASum) {
  std::size_t count = 0;
  for (const auto& [name, site] : kSites)
    for (const auto& plan : enumerate_plans(bottleneck(64, 64, 8), site)) {
      EXPECT_NE(plan.steps[1].x, kPending);
      EXPECT_NE(plan.steps[1].saved_x, kPending);
      count += plan.steps[0].y == kPending;  // then it is moved on the way
    }
  EXPECT_GT(count, 0u);
  const BypassForm form = bottleneck(14336, 4096, 16);
  const auto best = choose_plan(form, kSites.at("row"), kLlama, 4, {}).best();
  EXPECT_EQ(best.cost.collectives, 1);  // what a LoRA leaves a sum has to be summed here
}

TEST(BypassChoiceTest, AVectorLiesAsWhatItMultiplies) {
  const SiteStates heads{kOutSplit, {kFeatureSplit}, {kFeatureSplit}, {kFeatureSplit}, {kFeatureSplit}};
  const BypassForm form = vector(1024);
  const auto best = choose_plan(form, heads, kLlama, 4, {}).best();
  EXPECT_EQ(summary(form, best.plan), "x|k l|in y|k, back y|k x|k");
  EXPECT_EQ(best.cost.parameter_bytes, 1024);
  EXPECT_EQ(best.cost.step_bytes, 0);
}

// By hand: x|k [512, 14336], A|in, u+, B=, on 4 ranks.
TEST(BypassCostTest, OfTheSlowestRank) {
  const BypassForm form = lora(14336, 4096, 16);
  const ParallelRates rates{.flops_per_second = 1e12,
                            .memory_bytes_per_second = 1e11,
                            .link_bytes_per_second = 1e10,
                            .collective_seconds = 1e-5};
  const auto choice = choose_plan(form, kSites.at("row"), kLlama, 4, rates);
  const auto* plan = find(choice, form, "x|k A|in u+ B= y+, back y= u= x|k");
  ASSERT_NE(plan, nullptr);
  const auto& cost = plan->cost;
  const double a = 16 * 14336 / 4, b = 16 * 4096;  // elements of a rank
  EXPECT_EQ(cost.parameter_bytes, 4 * (a + b));
  EXPECT_DOUBLE_EQ(cost.forward_seconds, 2 * 512 * (a + b) / 1e12 + 4 * (a + b) / 1e11);
  EXPECT_DOUBLE_EQ(cost.backward_seconds, 4 * 512 * (a + b) / 1e12 + 8 * (a + b) / 1e11);
  EXPECT_DOUBLE_EQ(cost.step_seconds, 4 * b * 2 * 3 / 4 / 1e10 + 1e-5);
  EXPECT_DOUBLE_EQ(cost.seconds, cost.forward_seconds + cost.backward_seconds + cost.step_seconds / 16);
  EXPECT_DOUBLE_EQ(cost.saved_bytes, 16 * 4);  // u
  EXPECT_DOUBLE_EQ(cost.memory_bytes, 4 * 4 * (a + b) + 512 * 16 * 4);
}

}  // namespace
}  // namespace flexcore
