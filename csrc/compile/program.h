#pragma once

#include <memory>
#include <span>
#include <vector>

#include "graph/graph.h"

namespace flexcore {

/// Told of tensors as soon as they have their final value, before their memory is used again.
class ProgramObserver {
 public:
  virtual ~ProgramObserver() = default;
  virtual void ready(TensorId tensor, const TensorView& value) = 0;
};

/// A run of a graph's nodes with memory assigned: the size table is made first, with the row capacities for the
/// symbolic counts; tensors whose lives do not overlap share bytes of one workspace.
class Program {
 public:
  Program() = default;
  /// `inputs` are bound by the caller at each run; `outputs` stay valid after the last node. `join`: outputs of one
  /// node lie side by side, as columns of one matrix, where the node and all readers take that
  /// (Operator::joins_outputs).
  Program(std::shared_ptr<const Graph> graph, std::vector<NodeId> nodes, std::vector<TensorId> inputs,
          std::vector<TensorId> outputs, const RowCounts& capacity, bool join = false);

  std::size_t workspace_bytes() const { return workspace_bytes_; }
  const std::vector<TensorId>& inputs() const { return inputs_; }
  const Graph& graph() const { return *graph_; }
  bool empty() const { return nodes_.empty(); }

  void observe(TensorId tensor);  // ready() is called for it
  void run(const RunState& state, const RowCounts& rows, std::byte* workspace, std::span<const TensorView> inputs,
           ProgramObserver* observer = nullptr) const;
  /// Where an output (or input) is when the program ran with these arguments.
  TensorView value(TensorId tensor, const RowCounts& rows, std::byte* workspace,
                   std::span<const TensorView> inputs) const;

 private:
  struct Place {
    int input = -1;           // index of the input that holds it; -1: workspace
    std::size_t offset = 0;   // in the workspace
    std::int64_t stride = 0;  // elements from row to row; of an input, its own
    bool known = false;
  };
  void assign_memory(const RowCounts& capacity, const std::vector<TensorId>& outputs, bool join);
  std::vector<bool> without_gaps() const;

  std::shared_ptr<const Graph> graph_;
  std::vector<NodeId> nodes_;
  std::vector<TensorId> inputs_;
  std::vector<Place> place_;                     // by TensorId
  std::vector<std::vector<TensorId>> observed_;  // by position in nodes_
  std::size_t workspace_bytes_ = 0;
};

}  // namespace flexcore
