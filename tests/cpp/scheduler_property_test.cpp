// Random workloads: whatever comes, every plan keeps the contract, no page is lost, and everything ends.

#include <gtest/gtest.h>

#include <random>

#include "flexcore/error.h"
#include "scheduler_fixture.h"

namespace flexcore {
namespace {

using testing::World;

struct Dice {
  std::mt19937 random;
  int operator()(int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); }
  int between(int low, int high) { return low + (*this)(high - low + 1); }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[(*this)(static_cast<int>(values.size()))];
  }
};

CostModel fitted(Dice& dice) {
  const double scale = dice.one_of({0.2, 1.0, 5.0});
  std::vector<CostModel::Sample> samples;
  for (int i = 0; i < 60; ++i) {
    StepFeatures f;
    f.decode_rows = f.sampled_rows = dice(8);
    f.decode_context = 40 * f.decode_rows;
    f.prefill_tokens = dice(2) * dice(100);
    f.finetune_tokens = dice(2) * dice(100);
    f.backward_units = dice(3);
    f.backward_layer_tokens = 30 * f.backward_units;
    const double ms = (f.any_forward() ? 5.0 : 0.0) + (f.any_finetune() ? 4.0 : 0.0) +
                      0.3 * static_cast<double>(f.decode_rows + f.prefill_tokens + f.finetune_tokens) +
                      0.05 * static_cast<double>(f.backward_layer_tokens) + static_cast<double>(f.backward_units);
    samples.push_back({f, scale * ms});
  }
  CostModel model;
  model.fit(samples);
  return model;
}

struct Counts {
  std::int64_t moves = 0, blocks_swapped = 0, forwards_swapped = 0;
};

/// One workload from its seed; returns its plans in words.
std::string play(unsigned seed, Counts* counts = nullptr) {
  Dice dice{std::mt19937(seed)};
  SchedulerConfig config;
  config.max_num_seqs = dice.one_of({1, 2, 3, 8, 64});
  config.max_num_batched_tokens = dice.one_of({1, 5, 16, 64, 512});
  config.num_layers = dice.between(1, 5);
  config.objectives[0].tpot_ms = dice.one_of({1.0, 20.0, 100.0});
  config.objectives[0].ttft_ms = dice.one_of({20.0, 2000.0});
  config.min_finetune_share = dice.one_of({0.0, 0.02, 0.3});
  config.max_finetune_tokens_in_flight = dice.one_of({1, 50, 200});
  const int block_size = dice.one_of({1, 4, 16});
  const int longest = dice.between(2, 120);
  const int pool = (longest + block_size - 1) / block_size + dice.one_of({0, 0, 1, 5, 20, 60});
  World world(config, pool, block_size, dice(2) == 0, dice.one_of({0, 0, pool / 2, 2 * pool}));
  if (dice(3) > 0) world.cost = fitted(dice);
  world.cost.set_swap_ms(dice.one_of({0.01, 1.0, 20.0}));

  const int num_jobs = dice(4), num_events = dice.between(5, 60);
  for (int id = 0; id < num_jobs; ++id) world.scheduler.add_job(id, dice.between(1, 3));
  std::set<std::int64_t> removed;
  const auto random_job = [&] { return static_cast<std::int64_t>(dice(std::max(1, num_jobs))); };
  for (int event = 0; event < num_events && !::testing::Test::HasFailure(); ++event) {
    const std::int64_t id = random_job();
    const bool exists = num_jobs > 0 && !removed.contains(id);
    switch (dice(9)) {
      case 0:
      case 1: {
        const int prompt = dice.between(1, longest - 1);
        std::vector<std::int32_t> tokens(static_cast<std::size_t>(prompt));
        for (auto& token : tokens) token = dice(40) == 0;  // long common prefixes
        auto& s = world.request(std::move(tokens), dice.between(1, longest - prompt));
        s.cache_key = static_cast<std::uint64_t>(dice(2));
        s.use_prefix_cache = dice(4) > 0;
        break;
      }
      case 2:
        if (!world.sequences.empty())
          world.scheduler.finish(
              world.sequences[static_cast<std::size_t>(dice(static_cast<int>(world.sequences.size())))].get());
        break;
      case 3:
      case 4:
        if (!exists) break;
        for (int n = dice.between(1, 5); n > 0; --n) {
          const int length = dice.between(1, longest);
          const auto room = static_cast<int>(pool - world.blocks.blocks_for(length));
          auto& s = world.example(id, length, dice(3) ? 0 : dice.between(1, 40), dice(3) ? 0 : dice.between(1, 40),
                                  dice(4) ? dice(1 + std::min(room, dice(4) ? 12 : room)) : 0,
                                  dice(2) ? dice(1 + static_cast<int>(world.blocks.num_host_blocks())) : 0);
          s.program = dice(2);
          s.first_layer = dice(static_cast<int>(config.num_layers));
        }
        break;
      case 5:
        if (!exists) break;
        if (!world.paused.erase(id)) world.paused.insert(id);
        world.scheduler.pause_job(id, world.paused.contains(id));
        break;
      case 6:
        if (!exists || dice(3) > 0) break;
        world.scheduler.remove_job(id);
        removed.insert(id);
        break;
      default:
        for (int n = dice(12); n > 0; --n) world.step();
    }
  }
  // With some jobs still paused: all the others end. Then they too.
  world.run();
  for (const std::int64_t id : world.paused)
    if (!removed.contains(id)) world.scheduler.pause_job(id, false);
  world.paused.clear();
  world.run();
  for (const auto& s : world.sequences) EXPECT_EQ(s->state, Sequence::State::kFinished);
  for (const auto& s : world.training) EXPECT_TRUE(s->done || removed.contains(s->job_id));
  EXPECT_EQ(world.blocks.num_free(), pool);
  EXPECT_EQ(world.blocks.num_free_host(), world.blocks.num_host_blocks());
  if (counts != nullptr) {
    counts->moves += world.moves;
    counts->blocks_swapped += world.blocks_swapped;
    counts->forwards_swapped += world.forwards_swapped;
  }
  return world.log;
}

TEST(SchedulerProperty, EveryWorkloadEndsWithinItsLimits) {
  Counts counts;
  for (unsigned seed = 0; seed < 1500; ++seed) {
    play(seed, &counts);
    ASSERT_FALSE(::testing::Test::HasFailure()) << "seed " << seed;
  }
  EXPECT_GT(counts.moves, 10);
  EXPECT_GT(counts.blocks_swapped, 100);
  EXPECT_GT(counts.forwards_swapped, 3);
}

TEST(SchedulerProperty, SameInputSamePlan) {
  for (unsigned seed = 5000; seed < 5100; ++seed) ASSERT_EQ(play(seed), play(seed)) << "seed " << seed;
}

}  // namespace
}  // namespace flexcore
