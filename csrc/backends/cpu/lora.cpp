#include "ops/lora.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "backends/cpu/families.h"
#include "backends/cpu/kernels/elementwise.h"
#include "backends/cpu/kernels/lora.h"
#include "backends/cpu/rows.h"
#include "backends/cpu/scratch.h"
#include "core/bfloat16.h"
#include "core/number.h"

namespace flexcore::cpu {

namespace {

// Rows x depth of one converted tile: with the four rows of A in L1, 144 KiB of a 512 KiB L2. The depth is part of the
// arithmetic (sums along k are cut there); the rows are not.
constexpr std::int64_t kTileRows = 48, kTileDepth = 768;
// Rows of y in one task: enough to pay for turning B around, few enough to share the work.
constexpr std::int64_t kExpandRows = 96;
// Multiply-adds below which a parallel region costs more than it saves, and those of the smallest and largest task.
constexpr std::int64_t kSerialWork = 32768, kMinTaskWork = 16384, kMaxTaskWork = 524288;

/// One segment of one member, and its rank-r intermediates.
struct Piece {
  const LoraSegment* segment;
  std::size_t member;
  std::int64_t out_features;
  std::int64_t stride;        // of u and grad_u: the rank
  float* u = nullptr;         // [rows, stride]: x A^T
  float* grad_u = nullptr;    // [rows, stride]: grad_y B
  float* b_turned = nullptr;  // [rank, out_features]

  std::int64_t rows() const { return segment->end - segment->begin; }
};

/// All segments with rows, member after member.
template <class Members, class Output>
std::span<Piece> list_pieces(OpContext& context, const Members& members, Output&& output, bool backward) {
  std::size_t count = 0;
  for (const auto& member : members) count += member.segments.size();
  auto* pieces = context.scratch->allocate<Piece>(count);
  count = 0;
  for (std::size_t m = 0; m < members.size(); ++m) {
    const std::int64_t out_features = output(members[m]).shape(1);
    for (const auto& segment : members[m].segments) {
      const auto size = static_cast<std::size_t>((segment.end - segment.begin) * segment.rank);
      if (size == 0) continue;
      Piece piece{&segment, m, out_features, segment.rank};
      piece.u = context.scratch->allocate<float>(size);
      if (backward) {
        piece.grad_u = context.scratch->allocate<float>(size);
        piece.b_turned = context.scratch->allocate<float>(segment.rank * out_features);
      }
      pieces[count++] = piece;
    }
  }
  return {pieces, count};
}

/// Runs body(task, worker) for every task, in this thread when all of it is little work.
template <class Body>
void for_tasks(OpContext& context, std::int64_t count, std::int64_t work, Body&& body) {
  if (work <= kSerialWork) {
    for (std::int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
  context.threads->parallel_for_each(count, body);
}

/// Multiply-adds of a task such that every worker finds a few.
std::int64_t task_work(OpContext& context, std::int64_t work) {
  return std::clamp(work / (4 * context.threads->size()), kMinTaskWork, kMaxTaskWork);
}

/// Ranges of columns of about `work` multiply-adds each, in steps that fill registers.
struct ColumnChunks {
  ColumnChunks(std::int64_t columns, std::int64_t work_per_column, std::int64_t work)
      : columns(columns),
        step(round_up(std::max<std::int64_t>(work / std::max<std::int64_t>(work_per_column, 1), 1),
                      2 * lora_kernels().column_step)),
        count(divide_up(columns, step)) {}
  std::int64_t begin(std::int64_t i) const { return i * step; }
  std::int64_t end(std::int64_t i) const { return std::min(columns, (i + 1) * step); }

  std::int64_t columns, step, count;
};

/// Products of rows [begin, end) of `x` with the A of several pieces: the rows are read, and converted to float, once.
struct ShrinkGroup {
  std::int64_t begin, end;
  std::int64_t first, count;  // pieces, in the order of `ShrinkPlan::pieces`
};

struct ShrinkPlan {
  const Piece** pieces;
  ShrinkGroup* groups;
  std::int64_t num_groups = 0;
  std::int64_t work = 0;
};

/// Cuts the pieces into tiles of rows and puts the tiles of equal rows, which different members have, into one group.
ShrinkPlan plan_shrink(OpContext& context, std::span<const Piece> pieces, std::int64_t in_features) {
  ShrinkPlan plan;
  std::int64_t tiles = 0;
  std::size_t num_members = 0;
  for (const auto& piece : pieces) {
    tiles += divide_up(piece.rows(), kTileRows);
    plan.work += piece.rows() * piece.segment->rank * in_features;
    num_members = std::max(num_members, piece.member + 1);
  }
  plan.pieces = context.scratch->allocate<const Piece*>(tiles);
  plan.groups = context.scratch->allocate<ShrinkGroup>(tiles);

  // A cursor per member; the earliest tile comes next.
  struct Cursor {
    const Piece *piece, *end;
    std::int64_t row;
    std::int64_t tile_end() const { return std::min(row + kTileRows, piece->segment->end); }
  };
  auto* cursors = context.scratch->allocate<Cursor>(num_members);
  const Piece* next = pieces.data();
  const Piece* const last = next + pieces.size();
  for (std::size_t m = 0; m < num_members; ++m) {
    const Piece* first = next;
    while (next != last && next->member == m) ++next;
    cursors[m] = {first, next, first != next ? first->segment->begin : 0};
  }
  for (std::int64_t i = 0; i < tiles; ++i) {
    Cursor* earliest = nullptr;
    for (std::size_t m = 0; m < num_members; ++m) {
      auto& c = cursors[m];
      if (c.piece == c.end) continue;
      if (!earliest || std::pair(c.row, c.tile_end()) < std::pair(earliest->row, earliest->tile_end())) earliest = &c;
    }
    const std::int64_t begin = earliest->row, end = earliest->tile_end();
    auto& group = plan.groups[std::max<std::int64_t>(plan.num_groups - 1, 0)];
    if (plan.num_groups > 0 && group.begin == begin && group.end == end)
      ++group.count;
    else
      plan.groups[plan.num_groups++] = {begin, end, i, 1};
    plan.pieces[i] = earliest->piece;
    earliest->row = end;
    if (end == earliest->piece->segment->end && ++earliest->piece != earliest->end)
      earliest->row = earliest->piece->segment->begin;
  }
  return plan;
}

/// Rows [begin, end) of x times a [ranks, k] matrix, k tile by k tile.
struct ShrinkTarget {
  const float* a;
  std::int64_t ranks;
  float* u;  // of row `begin`
  std::int64_t u_stride;
};

// The converted rows of one tile; float rows are used where they are.
struct FloatTile {
  FloatTile(const TensorView& x, std::int64_t begin, std::int64_t end, std::int64_t k, std::int64_t depth,
            float* scratch) {
    if (x.dtype() == DType::kFloat32) {
      data = x.row<const float>(begin) + k;
      stride = x.stride(0);
      return;
    }
    data = scratch;
    stride = depth;
    elementwise_kernels().copy[1][0](
        {{x.row<const bfloat16>(begin) + k, x.stride(0)}, nullptr, {scratch, depth}, depth, false}, 0, end - begin);
  }
  const float* data;
  std::int64_t stride;
};

template <class Targets>
void shrink_rows(const TensorView& x, std::int64_t begin, std::int64_t end, float* scratch, std::int64_t num_targets,
                 Targets&& target) {
  const std::int64_t in_features = x.shape(1);
  for (std::int64_t k = 0; k < in_features; k += kTileDepth) {
    const std::int64_t depth = std::min(kTileDepth, in_features - k);
    const FloatTile tile(x, begin, end, k, depth, scratch);
    for (std::int64_t i = 0; i < num_targets; ++i) {
      const ShrinkTarget t = target(i);
      lora_kernels().shrink(
          {tile.data, tile.stride, end - begin, t.a + k, in_features, t.ranks, depth, t.u, t.u_stride, k > 0});
    }
  }
}

float* worker_tiles(OpContext& context, bool needed) {
  return needed ? context.scratch->allocate<float>(context.threads->size() * kTileRows * kTileDepth) : nullptr;
}

float* tile_of(float* tiles, int worker) { return tiles ? tiles + worker * kTileRows * kTileDepth : nullptr; }

/// u = x A^T for all pieces.
void shrink_all(OpContext& context, const TensorView& x, std::span<const Piece> pieces) {
  const ShrinkPlan plan = plan_shrink(context, pieces, x.shape(1));
  float* tiles = worker_tiles(context, x.dtype() == DType::kBFloat16);
  // With fewer groups than workers (a decode row of a large model) the ranks are divided too.
  const std::int64_t slices =
      plan.work <= kSerialWork ? 1 : std::max<std::int64_t>(context.threads->size() / plan.num_groups, 1);
  for_tasks(context, plan.num_groups * slices, plan.work, [&](std::int64_t task, int worker) {
    const ShrinkGroup& group = plan.groups[task / slices];
    const std::int64_t slice = task % slices;
    shrink_rows(x, group.begin, group.end, tile_of(tiles, worker), group.count, [&](std::int64_t i) {
      const Piece& piece = *plan.pieces[group.first + i];
      const std::int64_t rank = piece.segment->rank, part = round_up(divide_up(rank, slices), 4);
      const std::int64_t r = std::min(rank, slice * part), ranks = std::min(part, rank - r);
      return ShrinkTarget{piece.segment->lora_a + r * x.shape(1), ranks,
                          piece.u + (group.begin - piece.segment->begin) * piece.stride + r, piece.stride};
    });
  });
}

float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return v > 0.0f ? v : 0.0f;
    case Activation::kTanh:
      return std::tanh(v);
    case Activation::kGelu:
      return 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
    case Activation::kSilu:
      return v / (1.0f + std::exp(-v));
  }
  return v;
}

float derivative(Activation activation, float v) {
  switch (activation) {
    case Activation::kNone:
      return 1.0f;
    case Activation::kRelu:
      return v > 0.0f ? 1.0f : 0.0f;
    case Activation::kTanh: {
      const float t = std::tanh(v);
      return 1.0f - t * t;
    }
    case Activation::kGelu:
      return 0.5f * (1.0f + std::erf(v * 0.70710678f)) + v * 0.39894228f * std::exp(-0.5f * v * v);
    case Activation::kSilu: {
      const float s = 1.0f / (1.0f + std::exp(-v));
      return s * (1.0f + v * (1.0f - s));
    }
  }
  return 1.0f;
}

/// u = act(u); in the backward, grad_u is multiplied by the derivative there first. A rank's worth of numbers a row: no
/// kernel of its own.
void activate_all(OpContext& context, std::span<const Piece> pieces) {
  for (const Piece& p : pieces) {
    const Activation activation = p.segment->activation;
    if (activation == Activation::kNone) continue;
    context.threads->parallel_for(p.rows() * p.stride, 1024, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        if (p.grad_u != nullptr) p.grad_u[i] *= derivative(activation, p.u[i]);
        p.u[i] = activate(activation, p.u[i]);
      }
    });
  }
}

/// Tasks of several pieces numbered through: task -> (piece, task within it).
struct TaskTable {
  TaskTable(OpContext& context, std::int64_t num_pieces)
      : ends(context.scratch->allocate<std::int64_t>(num_pieces)), num_pieces(num_pieces) {}
  void add(std::int64_t piece, std::int64_t count) { ends[piece] = (piece > 0 ? ends[piece - 1] : 0) + count; }
  std::int64_t total() const { return num_pieces > 0 ? ends[num_pieces - 1] : 0; }
  std::pair<std::int64_t, std::int64_t> find(std::int64_t task) const {
    const std::int64_t piece = std::upper_bound(ends, ends + num_pieces, task) - ends;
    return {piece, task - (piece > 0 ? ends[piece - 1] : 0)};
  }

  std::int64_t* ends;
  std::int64_t num_pieces;
};

void lora_forward(OpContext& context, const LoraArgs& args) {
  const Arena::Scope scope(*context.scratch);
  const auto pieces = list_pieces(context, args.members, [](const auto& m) { return m.y; }, false);
  if (pieces.empty()) return;
  shrink_all(context, args.x, pieces);
  activate_all(context, pieces);

  std::int64_t work = 0;
  for (const Piece& p : pieces) work += p.rows() * p.segment->rank * p.out_features;
  const auto chunks_of = [&, part = task_work(context, work)](const Piece& p) {
    return ColumnChunks(p.out_features, std::min(p.rows(), kExpandRows) * p.segment->rank, part);
  };
  TaskTable tasks(context, pieces.size());
  for (std::size_t i = 0; i < pieces.size(); ++i)
    tasks.add(i, divide_up(pieces[i].rows(), kExpandRows) * chunks_of(pieces[i]).count);
  for_tasks(context, tasks.total(), work, [&](std::int64_t task, int) {
    const auto [index, part] = tasks.find(task);
    const Piece& p = pieces[index];
    const auto chunks = chunks_of(p);
    const std::int64_t row = part / chunks.count * kExpandRows, rows = std::min(kExpandRows, p.rows() - row);
    const std::int64_t chunk = part % chunks.count, begin = p.segment->begin + row;
    const TensorView y = args.members[p.member].y.rows(begin, begin + rows);
    lora_kernels().expand[type_index(y)]({p.u + row * p.stride, p.stride, rows, p.segment->rank, p.segment->lora_b,
                                          p.segment->rank, false, p.segment->scaling, y.data(), y.stride(0),
                                          chunks.begin(chunk), chunks.end(chunk)});
  });
}

/// grad_u = grad_y B, as a shrink along the output features.
void shrink_gradients(OpContext& context, const LoraBackwardArgs& args, std::span<const Piece> pieces) {
  context.threads->parallel_for_each(pieces.size(), [&](std::int64_t i, int) {
    const Piece& p = pieces[i];
    lora_kernels().transpose(p.segment->lora_b, p.segment->rank, p.out_features, p.segment->rank, p.b_turned,
                             p.out_features);
  });
  float* tiles = worker_tiles(context, true);
  TaskTable tasks(context, pieces.size());
  for (std::size_t i = 0; i < pieces.size(); ++i) tasks.add(i, divide_up(pieces[i].rows(), kTileRows));
  context.threads->parallel_for_each(tasks.total(), [&](std::int64_t task, int worker) {
    const auto [index, tile] = tasks.find(task);
    const Piece& p = pieces[index];
    const std::int64_t begin = p.segment->begin + tile * kTileRows, end = std::min(begin + kTileRows, p.segment->end);
    shrink_rows(args.members[p.member].grad_y, begin, end, tile_of(tiles, worker), 1, [&](std::int64_t) {
      return ShrinkTarget{p.b_turned, p.segment->rank, p.grad_u + tile * kTileRows * p.stride, p.stride};
    });
  });
}

// Columns [begin, end) of grad_x and of every grad_a. Pieces come in their order, so sums do not depend on the threads,
// and segments may share an adapter.
void input_gradients(const LoraBackwardArgs& args, std::span<const Piece> pieces, std::int64_t begin,
                     std::int64_t end) {
  const std::int64_t in_features = args.x.shape(1);
  for (const Piece& p : pieces) {
    const LoraSegment& s = *p.segment;
    if (args.grad_x) {
      const TensorView grad_x = args.grad_x.rows(s.begin, s.end);
      lora_kernels().expand[0]({p.grad_u, p.stride, p.rows(), s.rank, s.lora_a, in_features, true, s.scaling,
                                grad_x.data(), grad_x.stride(0), begin, end});
    }
    if (s.grad_a == nullptr) continue;
    const TensorView x = args.x.rows(s.begin, s.end);
    lora_kernels().gradient[type_index(x)]({x.data(), x.stride(0), p.rows(), p.grad_u, p.stride, s.rank, s.scaling,
                                            s.grad_a, false, in_features, begin, end});
  }
}

// Columns [begin, end) of grad_y, rows of grad_b, for one member.
void output_gradients(const LoraBackwardArgs& args, std::span<const Piece> pieces, std::size_t member,
                      std::int64_t begin, std::int64_t end) {
  for (const Piece& p : pieces) {
    if (p.member != member || p.segment->grad_b == nullptr) continue;
    const LoraSegment& s = *p.segment;
    const TensorView grad_y = args.members[member].grad_y.rows(s.begin, s.end);
    lora_kernels().gradient[type_index(grad_y)]({grad_y.data(), grad_y.stride(0), p.rows(), p.u, p.stride, s.rank,
                                                 s.scaling, s.grad_b, true, p.out_features, begin, end});
  }
}

void lora_backward(OpContext& context, const LoraBackwardArgs& args) {
  const Arena::Scope scope(*context.scratch);
  const auto pieces = list_pieces(context, args.members, [](const auto& m) { return m.grad_y; }, true);
  if (pieces.empty()) return;
  shrink_all(context, args.x, pieces);
  shrink_gradients(context, args, pieces);
  activate_all(context, pieces);

  // Table 0 is the columns of x, table 1 + m those of member m's output.
  const std::int64_t num_members = args.members.size();
  auto* work = context.scratch->allocate<std::int64_t>(num_members + 1);
  std::fill_n(work, num_members + 1, 0);
  std::int64_t total = 0;
  for (const Piece& p : pieces) {
    const std::int64_t per_column = p.rows() * p.segment->rank;
    work[0] += 2 * per_column;
    work[1 + p.member] += per_column;
    total += per_column * (2 * args.x.shape(1) + p.out_features);
  }
  const auto chunks_of = [&, part = task_work(context, total)](std::int64_t i) {
    return ColumnChunks(i == 0         ? args.x.shape(1)
                        : work[i] == 0 ? 0
                                       : args.members[i - 1].grad_y.shape(1),
                        work[i], part);
  };
  TaskTable tasks(context, num_members + 1);
  for (std::int64_t i = 0; i <= num_members; ++i) tasks.add(i, chunks_of(i).count);
  context.threads->parallel_for_each(tasks.total(), [&](std::int64_t task, int) {
    const auto [index, chunk] = tasks.find(task);
    const auto chunks = chunks_of(index);
    if (index == 0)
      input_gradients(args, pieces, chunks.begin(chunk), chunks.end(chunk));
    else
      output_gradients(args, pieces, index - 1, chunks.begin(chunk), chunks.end(chunk));
  });
}

}  // namespace

std::int64_t lora_scratch(const ScratchShape& s) {
  // At worst every row is a segment of its own. Of each piece: itself, u and grad_u with their padding, a tile, a task.
  constexpr std::int64_t kMembers = 3, kPadding = 64;
  const std::int64_t piece = sizeof(Piece) + 2 * (s.rank * 4 + kPadding) + 2 * (sizeof(ShrinkGroup) + 8) + 3 * 8;
  const std::int64_t tiles = 2 * s.num_threads * kTileRows * kTileDepth * 4;
  return kMembers * s.rows * piece + s.rank * s.widest_outputs() * 4 + tiles + 4096;
}

void register_lora(OpRegistry& registry) {
  registry.add<LoraArgs>(DeviceKind::kCpu, lora_forward);
  registry.add<LoraBackwardArgs>(DeviceKind::kCpu, lora_backward);
}

}  // namespace flexcore::cpu
