#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "compile/parallel_backbone.h"
#include "model/config.h"
#include "parallel/bypass_run.h"

namespace flexcore::test {

/// Executes a model's graph, and bypasses at its linears, forward and backward on simulated ranks as the plans say:
/// each rank has its shards of the weights and computes with them alone; whatever is moved is a transition of Ranks.
/// Plain loops; operators are told apart by name.
class ModelRun {
 public:
  /// Every prompt row is sampled, and all rows but the last have the next token as target.
  ModelRun(const Graph& graph, const ModelConfig& config, const BackboneOptions& options, Ranks& ranks);

  const ParallelBackbone& backbone() const { return backbone_; }
  const std::vector<Block>& weights() const { return whole_; }  // by ParamId; of a vector, one row
  void attach(SiteId site, const BypassForm& form, const BypassPlan& plan, const std::vector<Block>& weights);

  void detach_all() { attached_.clear(); }

  struct Result {
    Block hidden, logits, losses, grad_input;               // of the residual stream's first tensor
    std::map<SiteId, std::vector<Block>> weight_gradients;  // of bypasses
  };
  Result run(const std::vector<std::int32_t>& tokens);
  /// What the plans say that `rank` sends in a run.
  std::int64_t planned_bytes(int rank, std::int64_t num_tokens) const;

 private:
  struct Attached {
    SiteId site = 0;
    SiteStates states;
    std::unique_ptr<BypassRun> run;
  };

  void forward(const Node& node);
  void forward_linear(const Node& node);
  void backward(const Node& node);
  void backward_linear(const Node& node);
  /// Applies `compute(rank, output)` to zeros in `state`.
  Sharded compute(std::int64_t rows, std::int64_t features, ParallelState state,
                  const std::function<void(int, Block&)>& fill) const;
  void made(TensorId id, Sharded value);
  void contribute(TensorId id, Sharded gradient);
  const Sharded& grad_used(TensorId id);
  const Sharded& in_state(const Sharded& made, const Sharded& used, ParallelState state) const;
  Sharded& value(TensorId id) { return used_.at(id); }
  const Sharded& weight(ParamId id) const { return params_[static_cast<std::size_t>(id)]; }
  void rotate(const Block& in, Block& out, std::int64_t head_dim, bool inverse) const;
  std::int64_t head_of(const Sharded& x, int rank, std::int64_t head_dim) const;
  Block attend(int rank, const Node& node, const Block* grad, Block* grad_q, Block* grad_k, Block* grad_v);
  void cross_entropy(const Node& node);
  std::int64_t rows_of(RowSet rows, std::int64_t num_tokens) const;

  const Graph& graph_;
  const ModelConfig& config_;
  Ranks& ranks_;
  ParallelBackbone backbone_;
  std::vector<Block> whole_;
  std::vector<Sharded> params_;
  std::vector<Attached> attached_;

  std::vector<std::int32_t> tokens_;
  std::map<TensorId, Sharded> made_, used_, grad_made_, grad_used_;
  std::map<TensorId, std::vector<Sharded>> late_;  // gradients that join after the transition
  Block losses_;
};

}  // namespace flexcore::test
