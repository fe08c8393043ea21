#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flexcore {

/// One step of a bypass network, with the weight that it trains.
struct BypassStep {
  enum class Kind : std::uint8_t {
    kLinear,      // y = x W^T, W [out_features, in_features]
    kVector,      // y = x * w, w [in_features]
    kActivation,  // y = f(x) element by element, f not linear; nothing to train
  };
  Kind kind = Kind::kLinear;
  std::string name;  // of the weight, or the function: "A", "relu"
  std::int64_t in_features = 0, out_features = 0;
  std::int64_t num_parameters() const {
    return kind == Kind::kLinear ? in_features * out_features : kind == Kind::kVector ? in_features : 0;
  }
};

/// What a PEFT method adds to a backbone tensor: Y += f(X), f its steps one after the other (FlexLLM, arXiv 2402.18789,
/// section 4). Enough to plan it; how it is computed is its operator's.
struct BypassForm {
  std::vector<BypassStep> steps;
  std::int64_t num_parameters() const {
    std::int64_t count = 0;
    for (const auto& step : steps) count += step.num_parameters();
    return count;
  }
};

}  // namespace flexcore
