#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>

namespace flexcore {

/// What the ranks of a tensor-parallel group have of one dimension (FlexLLM, arXiv 2402.18789, section 5.1).
enum class DimState : char {
  kWhole = '-',       // nothing is divided along it
  kSplit = '|',       // every rank has its share
  kReplicated = '=',  // every rank has all of it
  kPending = '+',     // every rank has a summand of all of it: the sum is still to be taken
};

/// State of a matrix over the ranks. Dimension 0 of a tensor is its rows (tokens) and 1 its features; of a weight
/// [out, in] they are out and in. One group of ranks divides at most one dimension, and a copy or a summand is of both.
struct ParallelState {
  std::array<DimState, 2> dims{DimState::kWhole, DimState::kWhole};
  bool operator==(const ParallelState&) const = default;
};

inline constexpr ParallelState kAlone{{DimState::kWhole, DimState::kWhole}};  // rank 0 has it, the others nothing
inline constexpr ParallelState kReplicated{{DimState::kReplicated, DimState::kReplicated}};
inline constexpr ParallelState kPending{{DimState::kPending, DimState::kPending}};
inline constexpr ParallelState kRowSplit{{DimState::kSplit, DimState::kWhole}};
inline constexpr ParallelState kFeatureSplit{{DimState::kWhole, DimState::kSplit}};
inline constexpr ParallelState kOutSplit = kRowSplit, kInSplit = kFeatureSplit;  // of a weight [out, in]
inline constexpr std::array kParallelStates = {kReplicated, kRowSplit, kFeatureSplit, kPending, kAlone};

std::string tensor_text(ParallelState state);  // "=", "|t", "|k", "+", "-"
std::string weight_text(ParallelState state);  // "=", "|out", "|in", "-"

/// Elements of [0, size) that a rank has when they are split: as even as they can be, also where nothing divides.
struct Share {
  std::int64_t begin = 0, end = 0;
  std::int64_t size() const { return end - begin; }
};
inline Share share_of(std::int64_t size, int rank, int ranks) {
  return {size * rank / ranks, size * (rank + 1) / ranks};
}
/// What `rank` holds of a [rows, features] matrix.
struct LocalShape {
  Share rows, features;
  std::int64_t size() const { return rows.size() * features.size(); }
};
LocalShape local_shape(ParallelState state, std::int64_t rows, std::int64_t features, int rank, int ranks);
/// Of the rank that has the most.
LocalShape largest_local_shape(ParallelState state, std::int64_t rows, std::int64_t features, int ranks);

// Rules: the state of a result that every rank computes alone from what it has. None: it cannot.

ParallelState transposed(ParallelState state);
/// c = a b. With w = W^T these are the four rules of linears (FlexLLM, section 5.1):
///   X=, W= -> Y=     X|k, W|in -> Y+     X|t, W= -> Y|t     X=, W|out -> Y|out
/// a product is linear in each factor, so X+, W= -> Y+; and rank 0 may do it alone: X-, W- -> Y-.
std::optional<ParallelState> product_state(ParallelState a, ParallelState b);
/// c = a * b element by element.
std::optional<ParallelState> elementwise_state(ParallelState a, ParallelState b);
/// The vector that is left of a matrix when its rows are added up; a vector's state is that of a [1, features] matrix.
ParallelState sum_of_rows_state(ParallelState state);

struct LinearRule {  // y = x W^T
  static std::optional<ParallelState> y(ParallelState x, ParallelState w) { return product_state(x, transposed(w)); }
  static std::optional<ParallelState> grad_x(ParallelState g, ParallelState w) { return product_state(g, w); }
  static std::optional<ParallelState> grad_w(ParallelState g, ParallelState x) {
    return product_state(transposed(g), x);
  }
};

/// y = x * w, w a vector of x's features: rows of x may be split, w then is not.
struct VectorRule {
  static std::optional<ParallelState> y(ParallelState x, ParallelState w);
  static std::optional<ParallelState> grad_x(ParallelState g, ParallelState w) { return y(g, w); }
  static std::optional<ParallelState> grad_w(ParallelState g, ParallelState x);
};

/// y = f(x) element by element, f not linear: f of a sum is not the sum of f. The gradient is linear in g.
struct ActivationRule {
  static std::optional<ParallelState> y(ParallelState x);
  static std::optional<ParallelState> grad_x(ParallelState g, ParallelState x);
};

/// The state that makes a gradient whole for what made `forward`: of a sum every rank needs the gradient of its
/// summand, which is that of the sum; otherwise it lies as the tensor does.
inline ParallelState gradient_state(ParallelState forward) { return forward == kPending ? kReplicated : forward; }

}  // namespace flexcore
