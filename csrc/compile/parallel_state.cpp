#include "compile/parallel_state.h"

namespace flexcore {

namespace {

std::string text(ParallelState state, const char* rows, const char* features) {
  if (state == kReplicated) return "=";
  if (state == kPending) return "+";
  if (state == kAlone) return "-";
  return state == kRowSplit ? rows : features;
}

}  // namespace

std::string tensor_text(ParallelState state) { return text(state, "|t", "|k"); }
std::string weight_text(ParallelState state) { return text(state, "|out", "|in"); }

LocalShape local_shape(ParallelState state, std::int64_t rows, std::int64_t features, int rank, int ranks) {
  if (state == kAlone && rank > 0) return {};
  LocalShape shape{{0, rows}, {0, features}};
  if (state == kRowSplit) shape.rows = share_of(rows, rank, ranks);
  if (state == kFeatureSplit) shape.features = share_of(features, rank, ranks);
  return shape;
}

LocalShape largest_local_shape(ParallelState state, std::int64_t rows, std::int64_t features, int ranks) {
  // Of share_of the last is the largest.
  return local_shape(state, rows, features, state == kAlone ? 0 : ranks - 1, ranks);
}

ParallelState transposed(ParallelState state) { return {{state.dims[1], state.dims[0]}}; }

std::optional<ParallelState> product_state(ParallelState a, ParallelState b) {
  if (a == kReplicated && b == kReplicated) return kReplicated;
  if (a == kFeatureSplit && b == kRowSplit) return kPending;  // each rank has a part of the inner dimension
  if (a == kRowSplit && b == kReplicated) return kRowSplit;
  if (a == kReplicated && b == kFeatureSplit) return kFeatureSplit;
  if ((a == kPending && b == kReplicated) || (a == kReplicated && b == kPending)) return kPending;
  if (a == kAlone && b == kAlone) return kAlone;
  return {};
}

std::optional<ParallelState> elementwise_state(ParallelState a, ParallelState b) {
  if (a == b && a != kPending) return a;
  if ((a == kPending && b == kReplicated) || (a == kReplicated && b == kPending)) return kPending;
  return {};
}

ParallelState sum_of_rows_state(ParallelState state) { return state == kRowSplit ? kPending : state; }

std::optional<ParallelState> VectorRule::y(ParallelState x, ParallelState w) {
  if (x == kRowSplit) return w == kReplicated ? std::optional(kRowSplit) : std::nullopt;
  if (w == kPending) return {};
  return elementwise_state(x, w);
}

std::optional<ParallelState> VectorRule::grad_w(ParallelState g, ParallelState x) {
  const auto product = elementwise_state(g, x);
  return product ? std::optional(sum_of_rows_state(*product)) : std::nullopt;
}

std::optional<ParallelState> ActivationRule::y(ParallelState x) {
  return x == kPending ? std::nullopt : std::optional(x);
}

std::optional<ParallelState> ActivationRule::grad_x(ParallelState g, ParallelState x) {
  return x == kPending ? std::nullopt : elementwise_state(g, x);
}

}  // namespace flexcore
