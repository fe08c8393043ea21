#pragma once

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "compile/passes.h"

namespace flexcore {

inline constexpr int kHostParts = 16;

/// Of choices in order of time, `bytes` of which are on the device and in host memory: all without host memory; of the
/// others, for every kHostParts-th part of the device's bytes, the fastest and the one with the least there. Each that
/// is taken may become a program.
template <class Choice, class Bytes>
std::vector<Choice> few(std::vector<Choice> choices, Bytes&& bytes) {
  std::size_t most = 0;
  for (const auto& choice : choices) most = std::max(most, bytes(choice).device);
  std::vector<std::size_t> fastest(kHostParts + 1, choices.size()), least = fastest;
  std::set<std::size_t> taken;
  for (std::size_t i = 0; i < choices.size(); ++i) {
    const KeptBytes& own = bytes(choices[i]);
    if (own.host == 0) {
      taken.insert(i);
      continue;
    }
    // None on the device is a part of its own: what fits when nothing else does.
    const std::size_t part = most == 0 ? 0 : (own.device * kHostParts + most - 1) / most;
    if (fastest[part] == choices.size()) fastest[part] = i;
    if (least[part] == choices.size() || own.host < bytes(choices[least[part]]).host) least[part] = i;
  }
  taken.insert(fastest.begin(), fastest.end());
  taken.insert(least.begin(), least.end());
  taken.erase(choices.size());
  std::vector<Choice> found;
  for (const std::size_t i : taken) found.push_back(std::move(choices[i]));
  return found;
}

}  // namespace flexcore
