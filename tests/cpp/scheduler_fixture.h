#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "sched/scheduler.h"

namespace flexcore::testing {

inline SchedulerConfig small() {
  SchedulerConfig config;
  config.max_num_batched_tokens = 64;
  config.num_layers = 4;
  return config;
}

/// 5 ms a pass, 0.5 ms a row, 0.1 ms a backward row, 1 ms a unit.
inline CostModel simple_costs() {
  std::vector<CostModel::Sample> samples;
  for (int i = 0; i < 200; ++i) {
    StepFeatures f;
    f.decode_rows = i % 5;
    f.prefill_tokens = i % 3 * 20;
    f.finetune_tokens = i % 7 * 10;
    f.backward_units = i % 4;
    f.backward_layer_tokens = f.backward_units * (10 + i % 11);
    samples.push_back({f, (f.any_forward() ? 5.0 : 0.0) +
                              0.5 * static_cast<double>(f.decode_rows + f.prefill_tokens + f.finetune_tokens) +
                              0.1 * static_cast<double>(f.backward_layer_tokens) +
                              static_cast<double>(f.backward_units)});
  }
  CostModel model;
  model.fit(samples);
  return model;
}

/// Plays the engine: owns sequences, carries plans out in virtual time and checks every plan against the contract.
struct World {
  SchedulerConfig config;
  BlockManager blocks;
  CostModel cost;
  Scheduler scheduler;
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<std::unique_ptr<TrainSequence>> training;
  std::set<std::int64_t> paused;
  double now_ms = 0.0;
  std::string log;  // every plan in words, to compare runs

  World(const SchedulerConfig& c, std::int64_t num_blocks, std::int64_t block_size = 16, bool caching = true,
        std::int64_t host_blocks = 0)
      : config(c), blocks(num_blocks, block_size, caching, host_blocks), scheduler(config, blocks, cost) {}

  Sequence& request(std::vector<std::int32_t> prompt, std::int64_t max_tokens) {
    auto owned = std::make_unique<Sequence>();
    Sequence& s = *owned;
    s.id = static_cast<std::int64_t>(sequences.size()) + 1;
    s.num_prompt_tokens = static_cast<std::int64_t>(prompt.size());
    s.tokens = std::move(prompt);
    s.max_total_tokens = s.num_prompt_tokens + max_tokens;
    s.arrival_ms = now_ms;
    scheduler.add(&s);  // who is refused is not kept
    sequences.push_back(std::move(owned));
    return s;
  }
  Sequence& request(std::int64_t prompt, std::int64_t max_tokens) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(prompt));
    for (auto& token : tokens) token = next_token++;
    return request(std::move(tokens), max_tokens);
  }
  TrainSequence& example(std::int64_t job, std::int64_t length, std::int64_t window = 0, std::int64_t backward = 0,
                         std::int64_t store = 0, std::int64_t host_store = 0) {
    auto owned = std::make_unique<TrainSequence>();
    TrainSequence& s = *owned;
    s.id = static_cast<std::int64_t>(training.size()) + 1;
    s.job_id = job;
    s.length = length;
    s.window_tokens = window;
    s.backward_window_tokens = backward;
    s.store_blocks = store;
    s.host_store_blocks = host_store;
    scheduler.add_training(&s);
    training.push_back(std::move(owned));
    return s;
  }

  /// Plans, checks, commits, and gives every sampled row a token.
  StepPlan step(double elapsed_ms = -1.0) {
    StepPlan plan = scheduler.plan(now_ms);
    for (const auto& [from, to] : plan.moves)
      contents[static_cast<std::size_t>(to)] = contents[static_cast<std::size_t>(from)];
    const std::int64_t swapped = plan.blocks_swapped(blocks.num_blocks());
    moves += static_cast<std::int64_t>(plan.moves.size()) - swapped;
    blocks_swapped += swapped;
    forwards_swapped += std::count_if(plan.swapped.begin(), plan.swapped.end(),
                                      [](const TrainSequence* s) { return !s->in_backward(); });
    check(plan);
    write(plan);
    now_ms += elapsed_ms >= 0.0 ? elapsed_ms : std::max(1.0, plan.predicted_ms);
    scheduler.commit(plan);
    for (const SequenceWork& work : plan.inference) {
      Sequence& s = *work.sequence;
      EXPECT_EQ(s.num_computed_tokens, work.end);
      if (!work.sample) continue;
      s.tokens.push_back(next_token++);
      if (s.num_generated() == 1) s.first_token_ms = now_ms;
      if (static_cast<std::int64_t>(s.tokens.size()) >= s.max_total_tokens) scheduler.finish(&s);
    }
    check_pages();
    return plan;
  }
  /// Steps until all is done; fails when that takes too long or a plan is empty.
  int run(int most = 100000) {
    int steps = 0;
    while ((scheduler.has_inference() || scheduler.has_training()) && !::testing::Test::HasFailure()) {
      if (steps++ >= most) {
        ADD_FAILURE() << "not done after " << most << " steps";
        break;
      }
      const StepPlan plan = step();
      EXPECT_FALSE(plan.empty() && plan.preempted.empty()) << "nothing planned: " << plan.explain;
    }
    return steps;
  }

  void check(const StepPlan& plan);
  void check_pages() const;

  std::int32_t next_token = 0;
  /// What each page holds: a number for the tokens up to there and whose they are.
  std::vector<std::size_t> contents =
      std::vector<std::size_t>(static_cast<std::size_t>(blocks.num_blocks() + blocks.num_host_blocks()));
  std::int64_t moves = 0, blocks_swapped = 0, forwards_swapped = 0;

 private:
  void write(const StepPlan& plan);
  void check_contents() const;
  std::size_t content_of(const Sequence& s, std::int64_t tokens) const {
    std::size_t hash = s.cache_key + 1;
    for (std::int64_t i = 0; i < tokens; ++i)
      hash = hash * 1000003 + static_cast<std::size_t>(s.tokens[static_cast<std::size_t>(i)]) + 7;
    return hash;
  }
  static std::size_t content_of(const TrainSequence& s, std::size_t block) {
    return static_cast<std::size_t>(s.id) * 1000003 + block + (std::size_t{1} << 60);
  }
};

// As the engine: keys and values of rows go to their pages, and what a training sequence keeps to its run.
inline void World::write(const StepPlan& plan) {
  const auto page = [&](std::int32_t index) -> std::size_t& { return contents[static_cast<std::size_t>(index)]; };
  for (const SequenceWork& w : plan.inference)
    for (std::int64_t i = w.begin / blocks.block_size(); i < blocks.blocks_for(w.end); ++i)
      page(w.sequence->block_table[static_cast<std::size_t>(i)]) =
          content_of(*w.sequence, std::min(w.end, (i + 1) * blocks.block_size()));
  for (const TrainWindow& w : plan.forward) {
    const TrainSequence& s = *w.sequence;
    if (w.begin > 0) continue;
    for (std::size_t i = 0; i < s.block_table.size(); ++i) page(s.block_table[i]) = content_of(s, i);
    for (const auto& [run, first] : {std::pair(s.store, std::size_t{1000}), {s.host_store, std::size_t{2000}}})
      for (std::int64_t i = 0; i < run.count; ++i)
        page(static_cast<std::int32_t>(run.first + i)) = content_of(s, first + static_cast<std::size_t>(i));
  }
  check_contents();
}

/// Everybody finds what it wrote, wherever its pages are by now.
inline void World::check_contents() const {
  const auto page = [&](std::int32_t index) { return contents[static_cast<std::size_t>(index)]; };
  for (const auto& s : sequences) {
    if (s->state != Sequence::State::kRunning) continue;
    for (std::int64_t i = 0; i < s->num_computed_tokens / blocks.block_size(); ++i)
      ASSERT_EQ(page(s->block_table[static_cast<std::size_t>(i)]), content_of(*s, (i + 1) * blocks.block_size()))
          << "request " << s->id << " block " << i;
  }
  for (const auto& s : training) {
    if (s->swapped_out()) {
      const std::size_t pages = s->host_table.size() - static_cast<std::size_t>(s->store_blocks);
      for (std::size_t i = 0; i < s->host_table.size(); ++i)
        ASSERT_EQ(page(s->host_table[i]), content_of(*s, i < pages ? i : 1000 + i - pages));
    }
    ASSERT_EQ(s->host_store.count, s->started || s->swapped_out() ? s->host_store_blocks : 0);
    for (std::int64_t i = 0; i < s->host_store.count; ++i)
      ASSERT_EQ(page(static_cast<std::int32_t>(s->host_store.first + i)),
                content_of(*s, 2000 + static_cast<std::size_t>(i)));
    if (!s->started) continue;
    ASSERT_EQ(s->store.count, s->store_blocks);
    for (std::size_t i = 0; i < s->block_table.size(); ++i) ASSERT_EQ(page(s->block_table[i]), content_of(*s, i));
    for (std::int64_t i = 0; i < s->store.count; ++i)
      ASSERT_EQ(page(static_cast<std::int32_t>(s->store.first + i)),
                content_of(*s, 1000 + static_cast<std::size_t>(i)));
  }
}

inline void World::check(const StepPlan& plan) {
  const std::int64_t max_rows = config.max_num_batched_tokens;
  std::int64_t rows = 0;
  std::set<const void*> seen;
  for (const SequenceWork& w : plan.inference) {
    const auto length = static_cast<std::int64_t>(w.sequence->tokens.size());
    EXPECT_TRUE(seen.insert(w.sequence).second) << "one piece a sequence";
    EXPECT_EQ(w.sequence->state, Sequence::State::kRunning);
    EXPECT_EQ(w.begin, w.sequence->num_computed_tokens);
    EXPECT_TRUE(w.begin < w.end && w.end <= length);
    EXPECT_EQ(w.sample, w.end == length);
    EXPECT_EQ(w.decode, w.end - w.begin == 1 && w.sample && w.sequence->num_generated() > 0);
    EXPECT_GE(static_cast<std::int64_t>(w.sequence->block_table.size()), blocks.blocks_for(w.end));
    rows += w.end - w.begin;
  }
  for (const TrainWindow& w : plan.forward) {
    const TrainSequence& s = *w.sequence;
    EXPECT_TRUE(seen.insert(&s).second) << "one window a sequence";
    EXPECT_TRUE(s.started && !paused.contains(s.job_id));
    EXPECT_EQ(w.begin, s.forward_done);
    EXPECT_TRUE(w.begin < w.end && w.end <= s.length);
    EXPECT_TRUE(s.window_tokens == 0 || w.end - w.begin <= s.window_tokens);
    EXPECT_GE(static_cast<std::int64_t>(s.block_table.size()), blocks.blocks_for(s.length));
    rows += w.end - w.begin;
  }
  EXPECT_LE(rows, max_rows);

  std::map<const TrainSequence*, std::pair<std::int64_t, std::int64_t>> at;  // layer, rows left
  for (const BackwardUnit& unit : plan.backward) {
    std::int64_t unit_rows = 0;
    EXPECT_FALSE(unit.windows.empty());
    std::set<const void*> in_unit;
    for (const TrainWindow& w : unit.windows) {
      const TrainSequence& s = *w.sequence;
      EXPECT_TRUE(in_unit.insert(&s).second);
      EXPECT_TRUE(s.in_backward() && !s.done);
      EXPECT_EQ(unit.program, s.program);
      auto& [layer, left] = at.try_emplace(&s, s.layer, s.rows_left).first->second;
      EXPECT_EQ(unit.layer, layer);
      EXPECT_EQ(w.end, left);
      EXPECT_TRUE(0 <= w.begin && w.begin < w.end);
      const std::int64_t window = s.backward_window_tokens;
      EXPECT_TRUE(window == 0 || w.end - w.begin == std::min({window, left, max_rows}));
      left = w.begin;
      if (left == 0 && --layer >= s.first_layer) left = s.length;
      unit_rows += w.end - w.begin;
    }
    EXPECT_LE(unit_rows, max_rows);
  }

  std::int64_t started = 0, in_flight = 0;
  for (const auto& s : training)
    if (s->started) ++started, in_flight += s->length;
  EXPECT_LE(scheduler.num_running() + started, config.max_num_seqs);
  EXPECT_TRUE(started < 2 || in_flight <= config.max_finetune_tokens_in_flight);
  for (const Sequence* s : plan.preempted) EXPECT_TRUE(s->block_table.empty() && s->num_computed_tokens == 0);
  // Who is back in the same plan has pages again.
  for (const TrainSequence* s : plan.restarted)
    EXPECT_TRUE(s->forward_done == 0 && !s->swapped_out() &&
                (s->started || (s->block_table.empty() && !s->store && !s->host_store)));
  for (const TrainSequence* s : plan.swapped)
    EXPECT_TRUE(s->forward_done > 0 &&
                (s->swapped_out() ? s->block_table.empty() && !s->store && !s->started : s->started));
  for (const TrainSequence* s : plan.started) EXPECT_TRUE(s->started && !s->swapped_out());
  EXPECT_FALSE(plan.explain.empty());
  log += plan.explain + "\n";
  for (const SequenceWork& w : plan.inference)
    log += std::to_string(w.sequence->id) + ":" + std::to_string(w.end) + " ";
  for (const TrainWindow& w : plan.forward) log += std::to_string(w.sequence->id) + ":" + std::to_string(w.end) + " ";
  for (const BackwardUnit& unit : plan.backward)
    for (const TrainWindow& w : unit.windows)
      log += std::to_string(unit.layer) + "/" + std::to_string(w.sequence->id) + ":" + std::to_string(w.begin) + " ";
}

/// Nobody but requests with the same prefix shares a page, and every page is either held or free.
inline void World::check_pages() const {
  struct Holder {
    const Sequence* sequence = nullptr;
    std::size_t index = 0;
    bool held = false;
  };
  std::vector<Holder> holders(static_cast<std::size_t>(blocks.num_blocks() + blocks.num_host_blocks()));
  std::int64_t held = 0, held_host = 0;
  bool somebody_waits = false;
  for (const auto& s : sequences) {
    somebody_waits = somebody_waits || s->state == Sequence::State::kWaiting;
    EXPECT_FALSE(somebody_waits && s->state == Sequence::State::kRunning) << "request " << s->id << " jumped the queue";
    EXPECT_TRUE(s->state == Sequence::State::kRunning || s->block_table.empty());
    for (std::size_t i = 0; i < s->block_table.size(); ++i) {
      Holder& holder = holders[static_cast<std::size_t>(s->block_table[i])];
      if (!holder.held) {
        holder = {s.get(), i, true};
        ++held;
        continue;
      }
      const auto& other = *holder.sequence;
      const auto end = (i + 1) * static_cast<std::size_t>(blocks.block_size());
      ASSERT_TRUE(holder.index == i && other.cache_key == s->cache_key);
      ASSERT_TRUE(other.tokens.size() >= end && s->tokens.size() >= end);
      ASSERT_TRUE(
          std::equal(s->tokens.begin(), s->tokens.begin() + static_cast<std::ptrdiff_t>(end), other.tokens.begin()));
    }
  }
  for (const auto& s : training) {
    EXPECT_EQ(s->started, !s->block_table.empty());
    std::vector<std::int32_t> host_pages = s->host_table;
    for (std::int64_t i = 0; i < s->host_store.count; ++i)
      host_pages.push_back(static_cast<std::int32_t>(s->host_store.first + i));
    for (const std::int32_t page : host_pages) {
      Holder& holder = holders[static_cast<std::size_t>(page)];
      ASSERT_FALSE(holder.held || page < blocks.num_blocks()) << "host page " << page << " is held twice";
      holder.held = true;
      ++held_host;
    }
    for (const std::int32_t page : s->block_table) {
      Holder& holder = holders[static_cast<std::size_t>(page)];
      ASSERT_FALSE(holder.held) << "page " << page << " is held twice";
      holder.held = true;
      ++held;
    }
    for (std::int64_t i = 0; i < s->store.count; ++i) {
      Holder& holder = holders[static_cast<std::size_t>(s->store.first + i)];
      ASSERT_FALSE(holder.held) << "page " << s->store.first + i << " is held twice";
      holder.held = true;
      ++held;
    }
  }
  EXPECT_EQ(blocks.num_free() + held, blocks.num_blocks());
  EXPECT_EQ(blocks.num_free_host() + held_host, blocks.num_host_blocks());
}

}  // namespace flexcore::testing
