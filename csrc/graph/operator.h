#pragma once

#include <array>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "graph/bypass.h"
#include "ops/attention.h"
#include "ops/context.h"
#include "ops/weight.h"

namespace flexcore {

using TensorId = std::int32_t;
using NodeId = std::int32_t;
using ParamId = std::int32_t;
inline constexpr TensorId kNoTensor = -1;
inline constexpr NodeId kNoNode = -1;
inline constexpr ParamId kNoParam = -1;
inline constexpr int kNoLayer = -1;

/// Which rows of a batch a tensor has.
enum class RowSet : std::uint8_t { kTokens, kSampled, kTargets };
inline constexpr std::size_t kNumRowSets = 3;
using RowCounts = std::array<std::int64_t, kNumRowSets>;

/// What one run needs beside the graph's tensors. Built once a step on the host, read by every layer.
struct BatchState {
  TensorView token_ids;                  // [num_tokens] int32
  TensorView positions;                  // [num_tokens] int32
  TensorView cos, sin;                   // [max_positions, head_dim / 2] float32
  std::span<const AttentionSpan> spans;  // forward
  std::span<const AttentionBackwardSpan> backward_spans;
  std::span<const KvPages> pages;       // by layer
  std::span<const SiteSegments> sites;  // by LinearSite
  std::span<const VirtualRows> virtual_rows;
  TensorView sampled_rows, target_rows;  // int32 rows of the batch
  TensorView labels, grad_scale, loss;   // [target rows] int32, float32, float32
};

struct RunState {
  OpContext* context = nullptr;
  const BatchState* batch = nullptr;
  std::span<const WeightView> matrices;  // by ParamId; empty views for vectors
  std::span<const TensorView> vectors;   // by ParamId; empty views for matrices
};

struct Node;
class BackwardBuilder;
class Graph;
class Operator;

/// An operator that makes some of a node's outputs again in the backward.
struct Recompute {
  std::shared_ptr<const Operator> op;
  std::vector<int> inputs, outputs;  // which of the node's it has
};

/// What an element of an operator's outputs depends on: how its tensors may be divided over ranks.
struct Coupling {
  static constexpr std::int64_t kWholeRow = 0;
  std::int64_t features = kWholeRow;  // as many next to each other belong together: 1, a head, or all of the row
  bool rows = true;                   // rows of a sequence, or of the batch, belong together
};

/// What a node computes. Stateless: attributes only.
class Operator {
 public:
  virtual ~Operator() = default;
  virtual std::string_view name() const = 0;
  virtual void run(const RunState& state, const Node& node, std::span<const TensorView> in,
                   std::span<const TensorView> out) const = 0;
  /// Adds the nodes that take the gradients of this node's outputs to those of its inputs.
  virtual void vjp(BackwardBuilder&, const Node&) const {}
  /// The input whose memory this output takes over, or -1.
  virtual int alias(int /*output*/) const { return -1; }
  /// False: the alias only saves memory, the kernel can also write elsewhere.
  virtual bool in_place_only() const { return true; }
  /// Its outputs may be columns of one matrix, so that one product can make or read all of them.
  virtual bool joins_outputs() const { return false; }
  /// Rows of an input of that width may have gaps.
  virtual bool takes_gaps(std::int64_t /*width*/) const { return true; }
  /// Cheap enough (no GEMM, no attention) to run again in the backward instead of keeping its output.
  virtual bool rebuildable() const { return false; }
  /// Makes at least the wanted outputs again, whatever that costs. None: it cannot.
  virtual std::optional<Recompute> recompute(const std::vector<bool>& /*wanted*/) const { return {}; }
  /// Multiplications and additions for a row that attends to `context` positions.
  virtual double flops(const Graph&, double /*context*/) const { return 0.0; }
  virtual Coupling coupling() const { return {}; }
  /// The frozen parameters that it reads.
  virtual std::vector<ParamId> params() const { return {}; }
  /// Holds trainable parameters: its outputs need gradients.
  virtual bool trainable() const { return false; }
  /// Has nothing to do in this batch: its outputs take over their inputs' memory and stay as they are, or nobody reads
  /// them. Then it is not run.
  virtual bool idle(const BatchState&) const { return false; }
  /// Does something beside writing its outputs; never removed.
  virtual bool effect() const { return false; }
};

}  // namespace flexcore
