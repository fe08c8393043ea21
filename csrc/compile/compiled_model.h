#pragma once

#include <compare>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "compile/passes.h"
#include "compile/program.h"
#include "ops/scatter.h"

namespace flexcore {

/// A forward tensor that a sequence keeps until its backward: [length, width] per sequence, at the tokens' absolute
/// depth.
struct SavedTensor {
  TensorId trunk = kNoTensor;  // in the trunk's graph
  int layer = kNoLayer;        // whose backward reads it
  std::int64_t width = 0;
  DType dtype = DType::kFloat32;       // as it is kept; uint8: codes in groups (ops/scatter.h)
  DType read_dtype = DType::kFloat32;  // as the backward reads it
  bool in_host = false;
  std::size_t offset = 0;  // bytes per token of the saved tensors before it in that memory
  std::size_t bytes_per_token() const { return static_cast<std::size_t>(kept_row_bytes(dtype, width)); }
};

/// What the backward's layers recompute and offload: an index into keep_options for the first layers, and one for the
/// others.
struct KeepChoice {
  int first = 0, others = 0;
  std::int64_t num_first = 0;
  auto operator<=>(const KeepChoice&) const = default;
};

/// The compiled backward for one set of bypasses.
struct TrainingProgram {
  struct Layer {
    Program program;         // inputs: gradient of the layer's output, then saved tensors
    std::vector<int> saved;  // index into `saved` of each further input
    TensorId grad_out =
        kNoTensor;  // gradient of the layer's input, in place of the first input; kNoTensor below the lowest bypass
  };
  struct Choice {  // for the explanation
    std::string name;
    int layer = kNoLayer;
    Keep keep = Keep::kDropped;
    std::size_t bytes_per_token = 0;
  };

  std::vector<SavedTensor> saved;
  std::vector<std::vector<int>> saved_of_trunk;  // by tensor of the trunk: indices into `saved`
  KeptBytes saved_bytes_per_token;
  double backward_cost = 1.0;  // time of a unit, of one that recomputes nothing; ways from host memory left out
  std::vector<Layer> layers;   // empty programs below first_layer
  int first_layer = 0;
  Program loss_head;  // input: hidden state; output: target_grad
  TensorId target_grad = kNoTensor;
  std::vector<Choice> choices;
  std::size_t workspace_bytes = 0;         // of any of its programs
  std::size_t gather_bytes_per_token = 0;  // of a layer's inputs, when a unit has windows of several sequences
};

/// Rewrites a graph with bypass networks (peft/): those of the set, or, without a set, all that there may be, idle in a
/// batch that has none of them.
using AttachBypasses = std::function<void(Graph&, const BypassSet*)>;

/// Every program of one model. Sizes are known before anything is allocated.
class CompiledModel {
 public:
  /// `base`: the architecture's graph without bypasses. `join`: as for Program.
  CompiledModel(Graph base, AttachBypasses attach, const RowCounts& capacity, bool join = false);

  const Program& trunk() const { return trunk_; }
  const Program& sample_head() const { return sample_head_; }  // input: hidden state; output: logits
  const Program& score_head() const { return score_head_; }    // input: hidden state; writes the batch's loss
  TensorId hidden() const { return trunk_.graph().hidden; }
  TensorId logits() const { return trunk_.graph().logits; }
  const Graph& base() const { return base_; }
  /// LoRA at every linear of the layers.
  BypassSet lora_everywhere() const;

  /// What choosing what to keep goes by; before the first choice is asked for. Sizes do not depend on it.
  void set_rates(const OperatorRates& rates) { rates_ = rates; }
  /// Compiled at the first use of a set of bypasses and kept. The reference stays valid.
  TrainingProgram& training(const BypassSet& bypasses, const KeepChoice& choice = {});
  /// Ways of keeping less, the fastest first.
  struct Candidate {
    KeepChoice choice;
    KeptBytes bytes_per_token;
    double seconds_per_token = 0.0;
  };
  const std::vector<Candidate>& keep_candidates(const BypassSet& bypasses);
  std::size_t workspace_bytes() const { return workspace_bytes_; }  // of the serving programs

 private:
  Graph base_;
  AttachBypasses attach_;
  RowCounts capacity_;
  bool join_;
  Program trunk_, sample_head_, score_head_;
  std::size_t workspace_bytes_ = 0;
  /// A training graph before it is decided what to keep.
  struct Draft {
    std::shared_ptr<Graph> graph;
    std::size_t num_forward = 0;
    BackwardGraph backward;
  };
  Draft draft(const BypassSet& bypasses) const;
  struct Options {
    std::vector<KeepOption> of_layer;                // of one that is like most
    std::vector<std::vector<KeptBytes>> kept_bytes;  // by layer and option
    std::vector<Candidate> candidates;
  };
  const Options& options(const BypassSet& bypasses);
  std::vector<Candidate> list_candidates(const Options& options) const;
  double seconds_of(const KeepOption& option, const KeptBytes& kept) const;

  OperatorRates rates_;
  std::map<std::pair<BypassSet, KeepChoice>, std::unique_ptr<TrainingProgram>> training_;
  std::map<BypassSet, Options> options_;
};

}  // namespace flexcore
