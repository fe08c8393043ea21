#pragma once

#include <compare>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "backends/register.h"
#include "backends/scratch.h"
#include "compile/compiled_model.h"
#include "engine/lane.h"
#include "model/config.h"
#include "model/weight_store.h"
#include "ops/scatter.h"
#include "sched/block_manager.h"
#include "train/train_state.h"

namespace flexcore {

/// Consecutive tokens of one sequence that go through the forward together.
struct RowGroup {
  std::span<const std::int32_t> tokens;  // of the rows; virtual ones are negative
  std::int64_t position = 0;             // of the first row
  const std::int32_t* block_table = nullptr;
  const Adapter* adapter = nullptr;            // null: base model
  std::int64_t sampled = 0;                    // logits are made for the last so many rows
  TrainState* train = nullptr;                 // rows of a finetune window: saved, and their loss taken
  std::int64_t score_from = 0;                 // the row that the first score label follows
  std::span<const std::int32_t> score_labels;  // next token of the rows from there: their log-probabilities are wanted
  float* score = nullptr;                      // one a score label
};

/// A training sequence's rows in a backward unit.
struct BackwardRows {
  TrainState* train = nullptr;
  std::int64_t begin = 0, end = 0;
};

/// Runs a model's programs on batches: lays out rows, binds weights, pages, adapters and stores. Knows no request and
/// no job.
class Executor {
 public:
  /// `record`: forwards are recorded, where the device does that, and replayed.
  Executor(OpContext& context, DeviceRuntime& device, MemoryLedger& ledger, CompiledModel& model,
           const WeightStore& weights, const ModelConfig& config, DType compute, const ExecutorLimits& limits,
           const ScratchBytes& scratch, bool record);

  /// Grows the workspaces for a training program, before its first use.
  void reserve(const TrainingProgram& program);
  /// Of all lanes: forward's and, on a device with two streams, backward's.
  static std::size_t workspace_bytes(const CompiledModel& model, const TrainingProgram& program, std::int64_t max_rows,
                                     bool two_lanes);
  static std::size_t losses_bytes(const ExecutorLimits& limits);
  /// Most that recordings keep: tables on the device, and their images in page-locked memory.
  static constexpr std::size_t kMostRecordedBytes = std::size_t{64} << 20;

  /// Every row of every group in one pass. Logits of the sampled rows [sum of sampled, vocab_size] on the device, in
  /// the order of the groups; valid until the next call.
  TensorView forward(std::span<const RowGroup> groups);
  /// Where a block of the pool is, or a host block behind them: block_bytes, and those of the next ones behind it.
  std::byte* block(std::int64_t index) const {
    const Buffer& pages = index < limits_.num_blocks ? pages_buffer_ : host_pages_;
    return pages.data() +
           static_cast<std::size_t>(index < limits_.num_blocks ? index : index - limits_.num_blocks) * block_bytes_;
  }
  /// Where a run of them begins; null: it is empty.
  std::byte* block(const BlockRun& run) const { return run ? block(run.first) : nullptr; }
  /// Copies blocks, in order, while nothing runs; they are there when it returns.
  void move_blocks(std::span<const BlockMove> moves);
  /// Waits for whatever was given to the device, and forgets what it was for: after an error, before memory that it may
  /// still use is given to others.
  void abandon();
  /// Waits for the forward, then gives its losses and scores to its groups. The host need not wait before.
  void finish_forward();
  /// One layer's backward for the rows; all sequences share one program, and their forward is finished. On a device
  /// with two streams it runs beside forwards until finish_backward.
  void backward(int layer, std::span<const BackwardRows> rows);
  void finish_backward();
  /// Whether backwards have memory and a stream of their own; else one ends what forward returned.
  bool runs_beside() const { return beside_ != nullptr; }

  /// Forwards whose launches were recorded, and that ran as a replay.
  std::int64_t num_recorded() const { return num_recorded_; }
  std::int64_t num_replayed() const { return num_replayed_; }

  const TrainShape& shape() const { return shape_; }

 private:
  struct Layout;          // of one forward batch
  struct BackwardLayout;  // of one backward unit
  using IndexArray = Lane::IndexArray;

  struct LaneBytes {
    std::size_t forward, backward;
  };
  static LaneBytes lane_bytes(const CompiledModel& model, const TrainingProgram& program, std::int64_t max_rows);

  void fetch_losses(std::int64_t begin, std::int64_t count);
  RunState state(Lane& lane) const;
  struct Segment {
    const Adapter* adapter;
    std::int64_t begin, end;    // rows
    const TrainState* dropout;  // whose elements are dropped; null: none
    std::int64_t position;      // of its first row
  };
  static void add_segment(Lane& lane, const Segment& segment, float* gradients);
  /// What the launches of a recorded forward depend on, the contents of its tables aside.
  struct RecordedKey {
    std::int64_t rows = 0;
    std::size_t spans = 0, adapters = 0, windows = 0;
    const TrainingProgram* program = nullptr;  // of the windows
    auto operator<=>(const RecordedKey&) const = default;
  };
  Layout lay_out(std::span<const RowGroup> groups);
  BackwardLayout lay_out_backward(std::span<const BackwardRows> rows);
  std::vector<TensorView> gather(const BackwardLayout& layout, const TrainingProgram& program,
                                 const TrainingProgram::Layer& unit);
  void store_gradients(const BackwardLayout& layout, const TensorView& out, bool of_embeddings);
  void list_windows(const Layout& layout);
  bool fix(Layout& layout, std::span<const Segment> segments, std::vector<std::int32_t>& tokens,
           std::vector<std::int32_t>& positions);
  void run_recorded(const RecordedKey& key, const std::function<void()>& work);
  void forget_old_recordings();
  void add_output_targets(TrainState& train, std::int64_t position, std::span<const std::int32_t> offsets,
                          std::int64_t first_row);
  void run_loss(const Layout& layout, const TensorView& hidden);
  void run_score(const Layout& layout, const TensorView& hidden);
  TensorView run_sample(const Layout& layout, const TensorView& hidden);
  std::byte* head_workspace() const;

  CompiledModel& model_;
  TrainShape shape_;
  ExecutorLimits limits_;
  DeviceRuntime& device_;
  MemoryLedger& ledger_;
  std::vector<WeightView> matrices_;  // by ParamId
  std::vector<TensorView> vectors_;
  Buffer pages_buffer_, host_pages_, rotary_;
  std::size_t block_bytes_ = 0;
  std::vector<KvPages> pages_;  // by layer
  Lane forward_;
  std::unique_ptr<Lane> beside_;  // backward's, on a second stream
  Lane& backward_;                // that, or forward's
  Buffer losses_;                 // host memory that the device writes: [max_rows] of the last forward
  struct Outcome {
    TrainState* train;  // whose loss it is; null: a score
    float* score;
    std::int64_t begin, end;  // in losses_
  };
  std::vector<Outcome> outcomes_;
  std::vector<AttentionSpan> spans_;  // of the last forward; never moved
  std::uint64_t num_batches_ = 0;

  struct Windows {
    std::vector<SaveSpan> device, host;  // the same rows, with the stores there
  };
  std::map<TrainingProgram*, Windows> windows_;  // of the last forward

  struct Recorded {
    bool seen = false;
    int attempts = 0;
    std::uint64_t used = 0;  // by which batch
    std::unique_ptr<RecordedWork> work;
  };
  bool record_;
  std::map<RecordedKey, Recorded> recorded_;
  std::int64_t num_recorded_ = 0, num_replayed_ = 0;
};

}  // namespace flexcore
