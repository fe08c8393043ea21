#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "compile/compiled_model.h"
#include "flexcore/config.h"
#include "memory/buffer.h"
#include "peft/adapter_store.h"

namespace flexcore {

/// Sizes that a training sequence's stores are made of.
struct TrainShape {
  std::int64_t hidden_size = 0;
  std::int64_t kv_width = 0;  // num_kv_heads * head_dim
};

/// A training sequence in flight: what its backward will need, at the tokens' absolute depth.
class TrainState {
 public:
  TrainState(const Example& example, std::shared_ptr<Adapter> adapter, TrainingProgram& program, float* gradients,
             float grad_scale);

  std::int64_t id = 0;
  const std::vector<std::int32_t>* block_table = nullptr;  // pages of its keys and values
  const Example* example;
  std::vector<std::int32_t> tokens, labels;  // of the example, behind the adapter's virtual tokens
  std::shared_ptr<Adapter> adapter;
  TrainingProgram* program;
  float* gradients;     // of the job, laid out as the adapter's parameters
  float grad_scale;     // 1 / target tokens of the optimizer step
  DropoutMask dropout;  // its sequence's; p 0: none
  double loss_sum = 0.0;
  std::int64_t num_targets = 0;
  /// Gradients of the adapter's output layer, which the forward makes, are added up to this position: once, whatever is
  /// restarted.
  std::int64_t output_gradients_end = 0;

  /// Where it keeps things from now on: store_bytes of the pool of pages, and of the swap space (null: nothing there),
  /// whose tags they leave meanwhile.
  struct Store {
    std::byte *device = nullptr, *host = nullptr;
  };
  void place(const Store& store, MemoryLedger& ledger, const TrainShape& shape);
  /// Forgets the forward done so far, after the scheduler has restarted the sequence.
  void restart();
  /// Its pages are somebody else's from now on; of a sequence that was swapped out, those of the pool.
  void release();
  void swap_out();

  TensorView saved(std::size_t index, std::int64_t begin, std::int64_t end) const;  // [rows, width], as it is kept
  const Store& store() const { return store_; }                                     // of all saved tensors
  TensorView grad_hidden(std::int64_t begin, std::int64_t end) const;               // [rows, hidden_size] float32
  float* grad_k() const;                                                            // [length, kv_width]
  float* grad_v() const;
  TensorView kv_gradients() const;  // both, [2 * length, kv_width]

  static KeptBytes saved_bytes(const TrainingProgram& program, std::int64_t length);
  static std::size_t gradient_bytes(const TrainShape& shape, std::int64_t length);
  static KeptBytes store_bytes(const TrainingProgram& program, const TrainShape& shape, std::int64_t length);
  std::int64_t length() const { return static_cast<std::int64_t>(tokens.size()); }

 private:
  float* gradients_at() const;
  Store store_;  // saved tensors, then, on the device, gradients
  LedgerLoan saved_loan_, offloaded_loan_, gradient_loan_;
  TrainShape shape_;
};

/// Rows of an example that have a target: labels[row + 1] != -100. Behind the virtual tokens of a prompt the first
/// token can be one too, as in PEFT.
std::int64_t count_targets(const Example& example, const AdapterLayout& layout);

}  // namespace flexcore
