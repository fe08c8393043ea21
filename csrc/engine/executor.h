#pragma once

#include <memory>
#include <span>
#include <vector>

#include "backends/register.h"
#include "compile/compiled_model.h"
#include "model/config.h"
#include "model/weight_store.h"
#include "ops/attention.h"
#include "peft/adapter_store.h"
#include "train/train_state.h"

namespace flexcore {

/// Consecutive tokens of one sequence that go through the forward together.
struct RowGroup {
  std::span<const std::int32_t> tokens;  // of the rows
  std::int64_t position = 0;             // of the first row
  const std::int32_t* block_table = nullptr;
  const Adapter* adapter = nullptr;            // null: base model
  std::int64_t sampled = 0;                    // logits are made for the last so many rows
  TrainState* train = nullptr;                 // rows of a finetune window: saved, and their loss taken
  std::span<const std::int32_t> score_labels;  // next token of the first rows: their log-probabilities are wanted
  float* score = nullptr;                      // one a score label
};

/// A training sequence's rows in a backward unit.
struct BackwardRows {
  TrainState* train = nullptr;
  std::int64_t begin = 0, end = 0;
};

struct ExecutorLimits {
  std::int64_t max_rows = 0;  // of a forward or a backward unit
  std::int64_t max_sampled_rows = 0;
  std::int64_t max_positions = 0;
  std::int64_t num_blocks = 0, block_size = 0;
};

/// Runs a model's programs on batches: lays out rows, binds weights, pages, adapters and stores. Knows no request and
/// no job.
class Executor {
 public:
  Executor(OpContext& context, DeviceRuntime& device, MemoryLedger& ledger, CompiledModel& model,
           const WeightStore& weights, const ModelConfig& config, DType compute, const ExecutorLimits& limits);

  /// Grows the workspace for a training program, before its first use.
  void reserve(const TrainingProgram& program);
  static std::size_t workspace_bytes(const CompiledModel& model, const TrainingProgram& program, std::int64_t max_rows);
  static std::size_t indices_bytes(const ExecutorLimits& limits);
  static std::size_t losses_bytes(const ExecutorLimits& limits);

  /// Every row of every group in one pass. Logits of the sampled rows [sum of sampled, vocab_size] on the device, in
  /// the order of the groups; valid until the next call.
  TensorView forward(std::span<const RowGroup> groups);
  /// Waits for the device, then gives the last forward's losses and scores to its groups. The host need not wait
  /// before.
  void finish_forward();
  /// One layer's backward for the rows; all sequences share one program.
  void backward(int layer, std::span<const BackwardRows> rows);

  const TrainShape& shape() const { return shape_; }

 private:
  struct Layout;  // of one forward batch
  enum class IndexArray : std::size_t { kTokens, kPositions, kRows, kLabels, kScale, kOffsets, kLoss };
  static constexpr std::size_t kNumIndexArrays = 7;

  TensorView index_array(IndexArray which, DType dtype, std::int64_t size) const;
  /// The array on the device, with what is in the host's table.
  template <class T>
  TensorView staged(IndexArray which, DType dtype, const std::vector<T>& table);
  void fetch_losses(std::int64_t count);
  RunState state() const;
  Layout lay_out(std::span<const RowGroup> groups);
  void run_loss(const Layout& layout, const TensorView& hidden);
  void run_score(const Layout& layout, const TensorView& hidden);
  TensorView run_sample(const Layout& layout, const TensorView& hidden);
  std::byte* head_workspace() const;
  void clear_segments();
  void add_segments(const Adapter& adapter, std::int64_t begin, std::int64_t end, float* gradients);

  OpContext& context_;
  CompiledModel& model_;
  TrainShape shape_;
  ExecutorLimits limits_;
  DeviceRuntime& device_;
  MemoryLedger& ledger_;
  std::vector<WeightView> matrices_;  // by ParamId
  std::vector<TensorView> vectors_;
  Buffer pages_buffer_, rotary_, indices_, workspace_;
  std::vector<KvPages> pages_;                  // by layer
  std::vector<std::vector<LoraSegment>> lora_;  // by site
  std::vector<SiteId> sites_in_use_;
  BatchState batch_;
  Buffer losses_;  // host memory that the device writes: [max_rows] of the last forward
  struct Outcome {
    TrainState* train;  // whose loss it is; null: a score
    float* score;
    std::int64_t begin, end;  // in losses_
  };
  std::vector<Outcome> outcomes_;
};

}  // namespace flexcore
