#pragma once

#include <functional>
#include <random>
#include <vector>

#include "compile/parallel_transition.h"
#include "core/check.h"

namespace flexcore::test {

/// A float32 matrix on one rank.
struct Block {
  std::int64_t rows = 0, features = 0;
  std::vector<float> data;
  Block() = default;
  Block(std::int64_t rows, std::int64_t features)
      : rows(rows), features(features), data(static_cast<std::size_t>(rows * features)) {}
  float& at(std::int64_t i, std::int64_t j) { return data[static_cast<std::size_t>(i * features + j)]; }
  float at(std::int64_t i, std::int64_t j) const { return data[static_cast<std::size_t>(i * features + j)]; }
  Block part(Share r, Share f) const;
  void put(const Block& part, std::int64_t row, std::int64_t feature);
  void add(const Block& other);
  static Block random(std::int64_t rows, std::int64_t features, std::mt19937& rng, float scale = 1.0f);
};

double dot(const Block& a, const Block& b);
double relative_error(const Block& got, const Block& want);  // norm-wise

/// A matrix over the ranks of a group: what each has of it.
struct Sharded {
  ParallelState state = kReplicated;
  std::int64_t rows = 0, features = 0;
  std::vector<Block> local;
};

/// A tensor-parallel group in one process. Every rank has arrays of its own; a collective is its messages, one rank to
/// another, and what is counted is what they carry.
class Ranks {
 public:
  explicit Ranks(int count) : sent(static_cast<std::size_t>(count)), count_(count) {}
  int count() const { return count_; }

  Sharded scatter(const Block& whole, ParallelState state, std::mt19937& rng) const;  // a sum gets random summands
  /// The value of a tensor. Copies have to agree to the last bit: ranks that drift apart are a mistake.
  Block value(const Sharded& x) const;
  Sharded zeros(ParallelState state, std::int64_t rows, std::int64_t features) const;
  Sharded largest(const Sharded& x);  // an all-reduce that takes the largest instead of the sum
  Sharded move(const Sharded& x, ParallelState to, std::int64_t element_bytes = 4);

  std::vector<std::int64_t> sent;  // bytes, by rank
  std::int64_t collectives = 0;

 private:
  Block message(int from, int to, const Block& block, std::int64_t element_bytes);
  /// Chunks by owner; afterwards every rank has every chunk.
  std::vector<std::vector<Block>> gather_round(const std::vector<Block>& chunks, std::int64_t element_bytes);
  /// Summands of chunks by rank and chunk; afterwards rank r has the sum of chunk r.
  std::vector<Block> reduce_round(std::vector<std::vector<Block>> summands, std::int64_t element_bytes);
  Sharded all_reduce(const Sharded& x, std::int64_t element_bytes);
  int count_;
  bool largest_ = false;  // instead of sums
};

}  // namespace flexcore::test
