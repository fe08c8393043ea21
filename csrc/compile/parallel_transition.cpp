#include "compile/parallel_transition.h"

#include <algorithm>

namespace flexcore {

std::string_view transition_name(TransitionKind kind) {
  switch (kind) {
    case TransitionKind::kNone:
      return "nothing";
    case TransitionKind::kSlice:
      return "slice";
    case TransitionKind::kTake:
      return "take";
    case TransitionKind::kKeepOne:
      return "keep one";
    case TransitionKind::kPad:
      return "pad";
    case TransitionKind::kPlace:
      return "place";
    case TransitionKind::kAllGather:
      return "all-gather";
    case TransitionKind::kReduceScatter:
      return "reduce-scatter";
    case TransitionKind::kAllReduce:
      return "all-reduce";
    case TransitionKind::kAllToAll:
      return "all-to-all";
    case TransitionKind::kGather:
      return "gather";
    case TransitionKind::kScatter:
      return "scatter";
    case TransitionKind::kReduce:
      return "reduce";
    case TransitionKind::kBroadcast:
      return "broadcast";
  }
  return "unknown";
}

TransitionKind Transition::kind() const {
  using enum TransitionKind;
  if (from == to) return kNone;
  const bool to_split = to == kRowSplit || to == kFeatureSplit;
  if (from == kReplicated) return to_split ? kSlice : to == kAlone ? kTake : kKeepOne;
  if (from == kPending) return to_split ? kReduceScatter : to == kAlone ? kReduce : kAllReduce;
  if (from == kAlone) return to_split ? kScatter : to == kPending ? kPlace : kBroadcast;
  return to_split ? kAllToAll : to == kAlone ? kGather : to == kPending ? kPad : kAllGather;
}

Transition Transition::adjoint() const {
  const auto dual = [](ParallelState state) {
    return state == kReplicated ? kPending : state == kPending ? kReplicated : state;
  };
  return {dual(to), dual(from)};
}

std::int64_t bytes_sent(const Transition& transition, std::int64_t rows, std::int64_t features,
                        std::int64_t element_bytes, int rank, int ranks) {
  if (ranks == 1) return 0;
  const std::int64_t all = rows * features;
  const int next = (rank + 1) % ranks;
  const auto elements = [&]() -> std::int64_t {
    switch (transition.kind()) {
      // Chunks go round until every rank has each: all of them pass through a rank but the next one's own.
      case TransitionKind::kAllGather:
        return all - local_shape(transition.from, rows, features, next, ranks).size();
      // Sums go round until each is at home: a rank sends on all but its own.
      case TransitionKind::kReduceScatter:
        return all - local_shape(transition.to, rows, features, rank, ranks).size();
      case TransitionKind::kAllReduce:
        return 2 * all - share_of(all, rank, ranks).size() - share_of(all, next, ranks).size();
      case TransitionKind::kAllToAll: {
        const auto mine = local_shape(transition.from, rows, features, rank, ranks);
        const auto then = local_shape(transition.to, rows, features, rank, ranks);
        const bool by_rows = transition.from == kRowSplit;
        return mine.size() -
               (by_rows ? mine.rows.size() * then.features.size() : then.rows.size() * mine.features.size());
      }
      case TransitionKind::kGather:
        return rank == 0 ? 0 : local_shape(transition.from, rows, features, rank, ranks).size();
      case TransitionKind::kScatter:
        return rank == 0 ? all - local_shape(transition.to, rows, features, 0, ranks).size() : 0;
      case TransitionKind::kReduce:  // rank 1 begins the chain, rank 0 ends it
        return rank == 0 ? 0 : all;
      case TransitionKind::kBroadcast:  // rank 0 begins, the last one only receives
        return rank == ranks - 1 ? 0 : all;
      default:
        return 0;
    }
  };
  return elements() * element_bytes;
}

std::int64_t most_bytes_sent(const Transition& transition, std::int64_t rows, std::int64_t features,
                             std::int64_t element_bytes, int ranks) {
  std::int64_t most = 0;
  for (int rank = 0; rank < ranks; ++rank)
    most = std::max(most, bytes_sent(transition, rows, features, element_bytes, rank, ranks));
  return most;
}

double bytes_sent_per_row(const Transition& transition, std::int64_t features, std::int64_t element_bytes, int ranks) {
  // Even shares: one row for each rank, and features that divide.
  const std::int64_t rows = ranks, width = features * ranks;
  return static_cast<double>(most_bytes_sent(transition, rows, width, element_bytes, ranks)) /
         static_cast<double>(rows * ranks);
}

}  // namespace flexcore
