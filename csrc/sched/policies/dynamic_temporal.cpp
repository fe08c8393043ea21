#include <algorithm>
#include <cmath>

#include "sched/policies/turns.h"

namespace flexcore {
namespace {

constexpr double kLeast = 64.0, kMost = 512.0;              // inference steps between two turns
constexpr double kRecentMs = 5'000.0, kUsualMs = 60'000.0;  // over which arrivals are counted

// Arrivals per ms, older ones counting for less; of the time since the first one while that is short.
class ArrivalRate {
 public:
  explicit ArrivalRate(double span_ms) : span_ms_(span_ms) {}
  void add(double now_ms) {
    if (sum_ == 0.0) first_ms_ = now_ms;
    sum_ = sum_ * decay(now_ms - last_ms_) + 1.0;
    last_ms_ = std::max(last_ms_, now_ms);
  }
  double at(double now_ms) const {
    constexpr double kLeastMs = 1'000.0;
    return sum_ * decay(now_ms - last_ms_) / (span_ms_ * (1.0 - decay(std::max(kLeastMs, now_ms - first_ms_))));
  }

 private:
  double decay(double ms) const { return std::exp(-std::max(0.0, ms) / span_ms_); }

  double span_ms_, sum_ = 0.0, first_ms_ = 0.0, last_ms_ = 0.0;
};

/// Turns whose frequency follows the load: they become rarer with every request that waits, and when requests come
/// faster than usual.
class DynamicTemporal final : public Turns {
 public:
  double interval(const Load& load) override {
    const double rush = std::max(1.0, recent_.at(load.now_ms) / std::max(usual_.at(load.now_ms), 1e-9));
    return std::clamp(kLeast * (1.0 + static_cast<double>(load.num_waiting)) * rush, kLeast, kMost);
  }
  void arrived(double arrival_ms) override {
    recent_.add(arrival_ms);
    usual_.add(arrival_ms);
  }

 private:
  ArrivalRate recent_{kRecentMs}, usual_{kUsualMs};
};

}  // namespace

std::unique_ptr<Policy> dynamic_temporal_policy() { return std::make_unique<DynamicTemporal>(); }

}  // namespace flexcore
