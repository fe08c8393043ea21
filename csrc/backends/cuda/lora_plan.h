#pragma once

#include <array>
#include <unordered_map>
#include <vector>

#include "backends/cuda/kernels/lora_expand.cuh"
#include "backends/cuda/kernels/lora_gradient.cuh"
#include "backends/cuda/kernels/lora_shrink.cuh"
#include "ops/lora.h"

// The tables that LoRA's kernels follow, made on the host from the segments of a call.
namespace flexcore::cuda {

/// One segment of one member, neighbours with the same adapter merged, and its rank-r intermediates in scratch.
struct LoraPiece {
  const LoraSegment* segment;
  std::size_t member;
  std::int64_t begin, end;  // rows of the batch
  std::int64_t out_features;

  int u_slabs = 1, grad_u_slabs = 1;
  float* u = nullptr;       // [slabs][rows, u_stride]: x A^T
  float* grad_u = nullptr;  // the same of grad_y B

  std::int64_t rows() const { return end - begin; }
  std::int64_t u_stride() const { return (segment->rank + 3) / 4 * 4; }
  std::int64_t slab() const { return rows() * u_stride(); }
};

/// Rows on which the same pieces are active.
struct LoraInterval {
  std::int64_t begin, end;
  std::vector<const LoraPiece*> pieces;  // in the order of members
  std::int64_t rows() const { return end - begin; }
};

/// Work for one kind of product in one numeric mode.
template <class Task>
struct LoraWork {
  std::vector<Task> tasks;
  int splits = 1;  // most of a task
  std::int64_t most_width = 0;
  int most_columns = 0;  // of a stack
  bool packs = true;     // every row of every tensor
};
template <class Task>
using LoraWorkByMode = std::array<LoraWork<Task>, 3>;  // by LoraMode

/// One launch of the expand kernel. `pass`: later ones add to what earlier ones wrote.
struct LoraExpandWork : LoraWork<LoraExpandTask> {
  int pass, tile_rows;
  bool is_bf16;
  int num_stacks = 0, tiles = 1;
};

struct LoraTables {
  std::vector<LoraPart> parts;
  std::vector<LoraStack> stacks;

  LoraWorkByMode<LoraShrinkTask> shrink, shrink_gradient;
  std::vector<LoraExpandWork> expand;
  LoraWorkByMode<LoraGradientTask> gradient;
  std::vector<LoraSum> slab_sums, gradient_sums;  // of u and grad_u; of grad_a and grad_b
  std::vector<LoraActivation> activations;        // of u, in one slab
};

/// Makes the tables of one call, step by step; scratch for intermediates is taken from `context`.
class LoraPlanner {
 public:
  LoraPlanner(OpContext& context, int num_multiprocessors, bool exact)
      : context_(context), multiprocessors_(num_multiprocessors), exact_(exact) {}

  template <class Members, class Output>
  void list_pieces(const Members& members, Output&& output) {
    for (std::size_t m = 0; m < members.size(); ++m)
      for (const auto& segment : members[m].segments) add_piece(segment, m, output(members[m]).shape(1));
  }
  bool empty() const { return pieces_.empty(); }

  void plan_shrink(const TensorView& x);
  void plan_shrink_gradient(const LoraBackwardArgs& args);
  /// Everything after these reads one slab.
  void plan_slab_sums();
  /// Of pieces with an activation; so does everything after them.
  void plan_activations();
  void plan_expand(const LoraArgs& args);
  void plan_grad_x(const TensorView& grad_x);
  void plan_gradients(const LoraBackwardArgs& args);

  LoraTables take_tables() { return std::move(tables_); }

 private:
  /// A gradient matrix, to which several chunks of rows may contribute.
  struct Target {
    std::int64_t size = 0;
    int contributions = 0, next = 0;
    float* slabs = nullptr;
  };

  void add_piece(const LoraSegment& segment, std::size_t member, std::int64_t out_features);
  std::vector<LoraInterval> cut_rows() const;
  LoraMode mode_of(const TensorView& x) const;
  void sum_slabs(LoraPiece& piece);
  int choose_tile_rows() const;
  int shrink_rows() const;
  int splits_of(std::int64_t width) const;
  template <class Pieces, class MakePart>
  std::pair<int, int> add_stacks(const Pieces& pieces, int columns, MakePart&& make_part);
  void add_shrink_tasks(LoraWork<LoraShrinkTask>& work, const TensorView& x, std::int64_t begin, std::int64_t end,
                        std::pair<int, int> stacks, int splits);
  void add_expand_tasks(const TensorView& y, std::int64_t begin, std::int64_t end, std::pair<int, int> stacks);
  void finish_expand();
  template <class Visit>
  void for_chunks(std::int64_t begin, std::int64_t end, Visit&& visit) const;
  void add_gradient_task(const TensorView& x, std::int64_t row, std::int64_t rows, std::pair<int, int> stacks);

  OpContext& context_;
  int multiprocessors_;
  bool exact_;
  std::vector<LoraPiece> pieces_;
  std::vector<LoraInterval> intervals_;
  int tile_rows_ = 32;
  LoraTables tables_;
  std::int64_t chunk_rows_ = 0;
  std::unordered_map<float*, Target> targets_;
};

}  // namespace flexcore::cuda
