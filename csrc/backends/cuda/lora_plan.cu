#include <algorithm>

#include "backends/cuda/lora_plan.h"
#include "backends/cuda/scratch.h"
#include "backends/cuda/views.h"
#include "core/number.h"

namespace flexcore::cuda {

namespace {

// Blocks that a launch should have per multiprocessor: two live there at once, and some end early.
constexpr std::int64_t kShortBlocksEach = 3;
// Slabs of u: more make shrink wider, and every reader of u slower. A row's sums must not depend on what else is in the
// batch, so that the width alone decides.
constexpr std::int64_t kMostSplits = 8, kSplitFeatures = 1024;
constexpr std::int64_t kLeastChunkRows = 128;
constexpr std::int64_t kMostExpandTiles = 16;

std::int64_t stacked_columns(const std::vector<const LoraPiece*>& pieces) {
  std::int64_t columns = 0;
  for (const auto* p : pieces) columns += p->u_stride();
  return columns;
}

bool same_adapter(const LoraSegment& a, const LoraSegment& b) {
  return a.lora_a == b.lora_a && a.lora_b == b.lora_b && a.rank == b.rank && a.scaling == b.scaling &&
         a.activation == b.activation && a.grad_a == b.grad_a && a.grad_b == b.grad_b;
}

LoraPart part_of(const LoraPiece& p, bool gradient, float* matrix, std::int64_t rank_step, std::int64_t feature_step) {
  return {.matrix = matrix,
          .rank_step = rank_step,
          .feature_step = feature_step,
          .u = gradient ? p.grad_u : p.u,
          .u_stride = p.u_stride(),
          .first_row = p.begin,
          .slab = p.slab(),
          .slabs = gradient ? p.grad_u_slabs : p.u_slabs,
          .scale = p.segment->scaling};
}
// Kernels read A and B, and write gradients, through one kind of part.
LoraPart with_a(const LoraPiece& p, bool gradient, std::int64_t in_features) {
  return part_of(p, gradient, const_cast<float*>(p.segment->lora_a), in_features, 1);
}
LoraPart with_b(const LoraPiece& p, bool gradient) {
  return part_of(p, gradient, const_cast<float*>(p.segment->lora_b), 1, p.segment->rank);
}

// Of A in steps of in_features, of B in steps of the rank: the longer step decides.
bool packs_of(const LoraPart& part) {
  return std::max(part.rank_step, part.feature_step) % 4 == 0 &&
         reinterpret_cast<std::uintptr_t>(part.matrix) % 16 == 0;
}

}  // namespace

std::int64_t lora_scratch(const ScratchShape& s, bool backward) {
  constexpr std::int64_t kMembers = 3, kFloat = sizeof(float);
  const std::int64_t u = kMembers * s.rows * divide_up(s.rank, 4) * 4 * kFloat;
  // Parts, stacks and tasks: at worst one of each for every row of every member and 32 of its ranks.
  const std::int64_t tables = kMembers * s.rows * (divide_up(s.rank, kLoraExpandDepth) + 4) * 256;
  if (!backward) return u * kMostSplits + tables;
  const std::int64_t contributions = divide_up(s.rows, kLeastChunkRows) + 1;
  return u * 2 * kMostSplits + tables +
         contributions * s.rank * (kMembers * s.widest_input() + s.widest_outputs()) * kFloat;
}

void LoraPlanner::add_piece(const LoraSegment& segment, std::size_t member, std::int64_t out_features) {
  if (segment.begin == segment.end || out_features == 0) return;
  if (!pieces_.empty()) {
    LoraPiece& last = pieces_.back();
    if (last.member == member && last.end == segment.begin && same_adapter(*last.segment, segment)) {
      last.end = segment.end;
      return;
    }
  }
  pieces_.push_back({.segment = &segment,
                     .member = member,
                     .begin = segment.begin,
                     .end = segment.end,
                     .out_features = out_features});
}

// Cuts the pieces at every row where one of them begins or ends.
std::vector<LoraInterval> LoraPlanner::cut_rows() const {
  struct Edge {
    std::int64_t row;
    const LoraPiece* piece;
    bool begins;
  };
  std::vector<Edge> edges;
  for (const auto& p : pieces_) {
    edges.push_back({p.begin, &p, true});
    edges.push_back({p.end, &p, false});
  }
  std::stable_sort(edges.begin(), edges.end(), [](const Edge& a, const Edge& b) { return a.row < b.row; });
  std::vector<LoraInterval> intervals;
  std::vector<const LoraPiece*> active;
  for (std::size_t i = 0; i < edges.size(); ++i) {
    if (edges[i].begins)
      active.insert(std::upper_bound(active.begin(), active.end(), edges[i].piece), edges[i].piece);
    else
      active.erase(std::find(active.begin(), active.end(), edges[i].piece));
    if (i + 1 < edges.size() && edges[i].row < edges[i + 1].row && !active.empty())
      intervals.push_back({edges[i].row, edges[i + 1].row, active});
  }
  return intervals;
}

LoraMode LoraPlanner::mode_of(const TensorView& x) const {
  if (exact_) return LoraMode::kExact;
  return x.dtype() == DType::kBFloat16 ? LoraMode::kBf16 : LoraMode::kSplit;
}

// Large tiles read u and B less often; small ones give every multiprocessor work.
int LoraPlanner::choose_tile_rows() const {
  std::int64_t rows = 0;
  for (const auto& interval : intervals_) rows += interval.rows();
  for (const int tile : {128, 64})
    if (rows >= tile * multiprocessors_ / 8) return tile;
  return 32;
}

int LoraPlanner::shrink_rows() const { return exact_ ? tile_rows_ : kShrinkRows; }

int LoraPlanner::splits_of(std::int64_t width) const {
  return static_cast<int>(std::clamp<std::int64_t>(width / kSplitFeatures, 1, kMostSplits));
}

/// The ranks of the pieces side by side, `columns` a stack. make_part(piece): of all its ranks. Returns the first stack
/// and how many.
template <class Pieces, class MakePart>
std::pair<int, int> LoraPlanner::add_stacks(const Pieces& pieces, int columns, MakePart&& make_part) {
  const int first = static_cast<int>(tables_.stacks.size());
  int column = columns;
  for (const LoraPiece* piece : pieces) {
    const LoraPart whole = make_part(*piece);
    const int rank = static_cast<int>(piece->segment->rank);
    for (int r = 0; r < rank;) {
      if (column >= columns) {
        tables_.stacks.push_back({static_cast<int>(tables_.parts.size()), 0, 0, true});
        column = 0;
      }
      LoraPart part = whole;
      part.matrix += r * whole.rank_step;
      part.u += r;
      part.column = column;
      part.ranks = std::min(rank - r, columns - column);
      tables_.parts.push_back(part);
      r += part.ranks;
      column += (part.ranks + 3) / 4 * 4;
      LoraStack& stack = tables_.stacks.back();
      ++stack.num_parts;
      stack.columns = column;
      stack.packs = stack.packs && packs_of(whole);
    }
  }
  return {first, static_cast<int>(tables_.stacks.size()) - first};
}

void LoraPlanner::add_shrink_tasks(LoraWork<LoraShrinkTask>& work, const TensorView& x, std::int64_t begin,
                                   std::int64_t end, std::pair<int, int> stacks, int splits) {
  for (std::int64_t row = begin; row < end; row += shrink_rows())
    for (int s = 0; s < stacks.second; ++s)
      work.tasks.push_back({.x = rows_of(x),
                            .width = x.shape(1),
                            .row = row,
                            .rows = static_cast<int>(std::min<std::int64_t>(shrink_rows(), end - row)),
                            .stack = stacks.first + s,
                            .splits = splits});
  for (int s = 0; s < stacks.second; ++s)
    work.most_columns = std::max(work.most_columns, tables_.stacks[static_cast<std::size_t>(stacks.first + s)].columns);
  work.splits = std::max(work.splits, splits);
  work.packs = work.packs && all_packs(x.shape(1), x);
}

void LoraPlanner::plan_shrink(const TensorView& x) {
  const std::int64_t width = x.shape(1);
  intervals_ = cut_rows();
  tile_rows_ = choose_tile_rows();
  const int splits = splits_of(width);
  for (auto& p : pieces_) {
    p.u_slabs = splits;
    p.u = context_.scratch->allocate<float>(static_cast<std::size_t>(p.u_slabs * p.slab()));
  }
  for (const auto& interval : intervals_)
    add_shrink_tasks(tables_.shrink[static_cast<int>(mode_of(x))], x, interval.begin, interval.end,
                     add_stacks(interval.pieces, kLoraN, [&](const LoraPiece& p) { return with_a(p, false, width); }),
                     splits);
}

void LoraPlanner::plan_shrink_gradient(const LoraBackwardArgs& args) {
  for (auto& p : pieces_) {
    const TensorView& grad_y = args.members[p.member].grad_y;
    p.grad_u_slabs = splits_of(p.out_features);
    p.grad_u = context_.scratch->allocate<float>(static_cast<std::size_t>(p.grad_u_slabs * p.slab()));
    add_shrink_tasks(tables_.shrink_gradient[static_cast<int>(mode_of(grad_y))], grad_y, p.begin, p.end,
                     add_stacks(std::array{&p}, kLoraN, [&](const LoraPiece& q) { return with_b(q, true); }),
                     p.grad_u_slabs);
  }
}

void LoraPlanner::sum_slabs(LoraPiece& p) {
  if (p.u_slabs > 1) tables_.slab_sums.push_back({p.u, p.u + p.slab(), p.slab(), p.u_slabs - 1});
  if (p.grad_u_slabs > 1) tables_.slab_sums.push_back({p.grad_u, p.grad_u + p.slab(), p.slab(), p.grad_u_slabs - 1});
  p.u_slabs = p.grad_u_slabs = 1;
}

void LoraPlanner::plan_slab_sums() {
  for (auto& p : pieces_) sum_slabs(p);
}

void LoraPlanner::plan_activations() {
  for (auto& p : pieces_) {
    if (p.segment->activation == Activation::kNone) continue;
    sum_slabs(p);
    tables_.activations.push_back({p.u, p.grad_u, p.slab(), static_cast<int>(p.segment->activation)});
  }
}

// A block keeps all ranks of its rows in shared memory, so many stacks mean few rows; more than fit go in passes.
void LoraPlanner::add_expand_tasks(const TensorView& y, std::int64_t begin, std::int64_t end,
                                   std::pair<int, int> stacks) {
  const bool is_bf16 = y.dtype() == DType::kBFloat16;
  for (int done = 0; done < stacks.second; done += kLoraMostStacks) {
    const int count = std::min(kLoraMostStacks, stacks.second - done), pass = done / kLoraMostStacks;
    const int rows_at_once = std::min(tile_rows_, kLoraPanelRows / (count <= 4 ? 4 : count <= 8 ? 8 : kLoraMostStacks));
    const LoraStack& last = tables_.stacks[static_cast<std::size_t>(stacks.first + done + count - 1)];
    auto found = std::find_if(tables_.expand.begin(), tables_.expand.end(), [&](const LoraExpandWork& w) {
      return w.pass == pass && w.tile_rows == rows_at_once && w.is_bf16 == is_bf16;
    });
    if (found == tables_.expand.end()) {
      found = tables_.expand.emplace(found);
      found->pass = pass, found->tile_rows = rows_at_once, found->is_bf16 = is_bf16;
    }
    for (std::int64_t row = begin; row < end; row += rows_at_once)
      found->tasks.push_back({.y = rows_of(y),
                              .width = y.shape(1),
                              .row = row,
                              .rows = static_cast<int>(std::min<std::int64_t>(rows_at_once, end - row)),
                              .stack = stacks.first + done,
                              .num_stacks = count,
                              .last_depth = (last.columns + 15) / 16 * 16});
    found->num_stacks = std::max(found->num_stacks, count);
    found->most_width = std::max(found->most_width, y.shape(1));
    found->packs = found->packs && all_packs(y.shape(1), y);
  }
}

void LoraPlanner::finish_expand() {
  std::stable_sort(tables_.expand.begin(), tables_.expand.end(),
                   [](const auto& a, const auto& b) { return a.pass < b.pass; });
  for (auto& work : tables_.expand) {
    std::int64_t tiles = 0;
    for (const auto& task : work.tasks) tiles += divide_up(task.width, kLoraN);
    work.tiles =
        static_cast<int>(std::clamp<std::int64_t>(tiles / (kShortBlocksEach * multiprocessors_), 1, kMostExpandTiles));
  }
}

void LoraPlanner::plan_expand(const LoraArgs& args) {
  for (const auto& p : pieces_)
    add_expand_tasks(args.members[p.member].y, p.begin, p.end,
                     add_stacks(std::array{&p}, kLoraExpandDepth, [](const LoraPiece& q) { return with_b(q, false); }));
  finish_expand();
}

void LoraPlanner::plan_grad_x(const TensorView& grad_x) {
  for (const auto& interval : intervals_)
    add_expand_tasks(grad_x, interval.begin, interval.end,
                     add_stacks(interval.pieces, kLoraExpandDepth,
                                [&](const LoraPiece& p) { return with_a(p, true, grad_x.shape(1)); }));
  finish_expand();
}

/// visit(row, rows) for chunks of nearly equal size.
template <class Visit>
void LoraPlanner::for_chunks(std::int64_t begin, std::int64_t end, Visit&& visit) const {
  const std::int64_t count = divide_up(end - begin, chunk_rows_);
  const std::int64_t rows = divide_up(divide_up(end - begin, count), kLoraK) * kLoraK;
  for (std::int64_t row = begin; row < end; row += rows) visit(row, std::min(rows, end - row));
}

void LoraPlanner::add_gradient_task(const TensorView& x, std::int64_t row, std::int64_t rows,
                                    std::pair<int, int> stacks) {
  auto& work = tables_.gradient[static_cast<int>(mode_of(x))];
  for (int s = 0; s < stacks.second; ++s)
    work.tasks.push_back(
        {.x = rows_of(x), .width = x.shape(1), .row = row, .rows = static_cast<int>(rows), .stack = stacks.first + s});
  work.most_width = std::max(work.most_width, x.shape(1));
  work.packs = work.packs && all_packs(x.shape(1), x);
}

void LoraPlanner::plan_gradients(const LoraBackwardArgs& args) {
  const std::int64_t in = args.x.shape(1);
  std::int64_t row_tiles = 0;  // rows times blocks across the features
  for (const auto& i : intervals_)
    row_tiles += i.rows() * divide_up(in, kLoraM) * divide_up(stacked_columns(i.pieces), kLoraN);
  for (const auto& p : pieces_)
    row_tiles += p.rows() * divide_up(p.out_features, kLoraM) * divide_up(p.u_stride(), kLoraN);
  chunk_rows_ = std::max(kLeastChunkRows, divide_up(row_tiles, kShortBlocksEach * multiprocessors_));

  const auto trained = [](std::vector<const LoraPiece*> pieces) {
    std::erase_if(pieces, [](const LoraPiece* p) { return p->segment->grad_a == nullptr; });
    return pieces;
  };
  // Who contributes to which gradient: one chunk adds to it at once, several have slabs.
  const auto count = [&](float* gradient, std::int64_t size) {
    auto& target = targets_[gradient];
    target.size = size;
    ++target.contributions;
  };
  for (const auto& i : intervals_)
    for_chunks(i.begin, i.end, [&](std::int64_t, std::int64_t) {
      for (const auto* p : trained(i.pieces)) count(p->segment->grad_a, p->segment->rank * in);
    });
  for (const auto& p : pieces_)
    if (p.segment->grad_b != nullptr)
      for_chunks(p.begin, p.end,
                 [&](std::int64_t, std::int64_t) { count(p.segment->grad_b, p.segment->rank * p.out_features); });
  const auto place = [&](LoraPart part) {
    Target& target = targets_[part.matrix];
    part.add = target.contributions == 1;
    if (part.add) return part;
    if (target.slabs == nullptr) {
      target.slabs = context_.scratch->allocate<float>(static_cast<std::size_t>(target.contributions * target.size));
      tables_.gradient_sums.push_back({part.matrix, target.slabs, target.size, target.contributions});
    }
    part.matrix = target.slabs + target.next++ * target.size;
    return part;
  };
  for (const auto& i : intervals_)
    for_chunks(i.begin, i.end, [&](std::int64_t row, std::int64_t rows) {
      add_gradient_task(args.x, row, rows, add_stacks(trained(i.pieces), kLoraN, [&](const LoraPiece& p) {
                          return place(part_of(p, true, p.segment->grad_a, in, 1));
                        }));
    });
  for (const auto& p : pieces_) {
    if (p.segment->grad_b == nullptr) continue;
    for_chunks(p.begin, p.end, [&](std::int64_t row, std::int64_t rows) {
      add_gradient_task(args.members[p.member].grad_y, row, rows,
                        add_stacks(std::array{&p}, kLoraN, [&](const LoraPiece& q) {
                          return place(part_of(q, false, q.segment->grad_b, 1, q.segment->rank));
                        }));
    });
  }
}

}  // namespace flexcore::cuda
