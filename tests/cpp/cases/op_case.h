#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "ops/registry.h"

/// Ops at the shapes of real models, one table for two readers: the test checks what each case computes, flexcore_bench
/// times it.
namespace flexcore::cases {

/// Which peak rate bounds the multiply-adds.
enum class Rate : std::uint8_t { kFloat32, kBFloat16 };

/// The least that one call must do, whoever writes the kernel.
struct Cost {
  double read = 0;     // bytes of inputs, each counted once
  double written = 0;  // bytes of outputs
  double flops = 0;
  Rate rate = Rate::kFloat32;
};

/// Largest error of the elements that were looked at, and what rounding may cost.
struct Accuracy {
  double worst = 0, allowed = 0;

  void see(double got, double wanted) {
    const double error = std::abs(got - wanted) / (1 + std::abs(wanted));
    worst = std::isnan(error) ? std::numeric_limits<double>::infinity() : std::max(worst, error);
  }
};

/// A case with its data. Outputs are poisoned with NaN until `run`, or zero where the op adds to them.
class OpCase {
 public:
  virtual ~OpCase() = default;
  /// One call on copy `turn % copies` of the data.
  virtual void run(OpContext& context, std::int64_t turn) = 0;
  /// Of copy 0 after its first run, at a sample of elements, against sums in double.
  virtual Accuracy check() const = 0;
};

struct CaseSpec {
  std::string op;     // "linear"
  std::string model;  // "smollm2", "llama8b"
  std::string shape;  // "gate_up/bfloat16/tokens:16"
  Cost cost;
  /// With several copies, calls in turn find nothing of theirs in the caches.
  std::function<std::unique_ptr<OpCase>(OpContext&, std::int64_t copies)> make;

  std::string name() const { return op + "/" + model + "/" + shape; }
};

std::vector<CaseSpec> all_cases();

// One a family; each appends its rows to the table.
void add_linear_cases(std::vector<CaseSpec>& table);
void add_lora_cases(std::vector<CaseSpec>& table);
void add_attention_cases(std::vector<CaseSpec>& table);
void add_elementwise_cases(std::vector<CaseSpec>& table);
void add_cross_entropy_cases(std::vector<CaseSpec>& table);
void add_sampling_cases(std::vector<CaseSpec>& table);
void add_optimizer_cases(std::vector<CaseSpec>& table);

/// An OpCase from a type with `Data(OpContext&, args...)`, `run(OpContext&)` and `check() const`.
template <class Data>
class Cycled : public OpCase {
 public:
  template <class... Args>
  Cycled(OpContext& context, std::int64_t copies, const Args&... args) {
    for (std::int64_t i = 0; i < copies; ++i) copies_.push_back(std::make_unique<Data>(context, args...));
  }
  void run(OpContext& context, std::int64_t turn) override {
    copies_[static_cast<std::size_t>(turn) % copies_.size()]->run(context);
  }
  Accuracy check() const override { return copies_.front()->check(); }

 private:
  std::vector<std::unique_ptr<Data>> copies_;
};

/// CaseSpec::make for Data(OpContext&, args...).
template <class Data, class... Args>
auto maker(Args... args) {
  return [args...](OpContext& context, std::int64_t copies) -> std::unique_ptr<OpCase> {
    return std::make_unique<Cycled<Data>>(context, copies, args...);
  };
}

}  // namespace flexcore::cases
