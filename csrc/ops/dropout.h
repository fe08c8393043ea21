#pragma once

#include "ops/registry.h"

namespace flexcore {

/// Names the random numbers of one sequence at one module. Every element has a number of its own, by its position and
/// feature: no split of a sequence changes them.
struct DropoutMask {
  double p = 0.0;  // that an element is dropped; in steps of 2^-16
  std::uint64_t seed = 0;
  std::uint32_t sequence = 0, module = 0;
};

/// y (+)= (kept * mask / (1 - p) + all) * x, row i being at position + i: x without what is dropped, or what that
/// changes. An element is dropped where its 16-bit random number is below p * 2^16. The gradient is the same operation.
/// Eight numbers come of one call of Philox 4x32-10, with the seed as key and (feature / 128 * 16 + feature % 16,
/// position, module, sequence) as counter: feature % 128 / 16 says which, low halves of words first, so that neighbours
/// in a row are neighbours in a vector.
struct DropoutArgs {
  static constexpr std::string_view kName = "dropout";
  TensorView x;  // [num_tokens, width] float32 or bfloat16
  TensorView y;  // like x in shape, float32 or bfloat16; may be x
  DropoutMask mask;
  std::int64_t position = 0;
  GradMode mode = GradMode::kWrite;
  float kept = 1.0f, all = 0.0f;
};
void check(const DropoutArgs& args);

}  // namespace flexcore
