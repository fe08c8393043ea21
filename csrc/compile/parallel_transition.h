#pragma once

#include <cstdint>
#include <string_view>

#include "compile/parallel_state.h"

namespace flexcore {

/// How a matrix gets from one state to another. Those that move nothing come first.
enum class TransitionKind : std::uint8_t {
  kNone,
  kSlice,          // = -> |   every rank keeps its share
  kTake,           // = -> -   rank 0 keeps it
  kKeepOne,        // = -> +   rank 0's copy is the sum, the others' summands are zero
  kPad,            // | -> +   zeros around every rank's share
  kPlace,          // - -> +   likewise
  kAllGather,      // | -> =
  kReduceScatter,  // + -> |
  kAllReduce,      // + -> =   a reduce-scatter, then an all-gather
  kAllToAll,       // |t <-> |k
  kGather,         // | -> -
  kScatter,        // - -> |
  kReduce,         // + -> -
  kBroadcast,      // - -> =
};
std::string_view transition_name(TransitionKind kind);  // "all-gather", ...

struct Transition {
  ParallelState from = kReplicated, to = kReplicated;
  bool operator==(const Transition&) const = default;
  TransitionKind kind() const;  // of every two states there is one
  bool collective() const { return kind() >= TransitionKind::kAllGather; }
  /// The transposed map of the ranks' arrays: a copy's adjoint is a sum, and the other way round. The adjoint of an
  /// all-gather so is a reduce-scatter, of a broadcast a reduce, of a slice a pad; an all-reduce is its own. A backward
  /// moves what the adjoint moves; less where a gradient is known to be replicated and nothing has to be summed.
  Transition adjoint() const;
};

/// Bytes that `rank` sends for a [rows, features] matrix, by the ring algorithms (Patarasuk and Yuan 2009, "Bandwidth
/// optimal all-reduce algorithms"). With even shares of n bytes over R ranks: all-gather and reduce-scatter
/// (R - 1) / R n, all-reduce twice that, all-to-all (R - 1) / R^2 n; reduce and broadcast are pipelined, n for every
/// rank but the last one of the chain.
std::int64_t bytes_sent(const Transition& transition, std::int64_t rows, std::int64_t features,
                        std::int64_t element_bytes, int rank, int ranks);
/// Of the rank that sends the most: it is what the others wait for.
std::int64_t most_bytes_sent(const Transition& transition, std::int64_t rows, std::int64_t features,
                             std::int64_t element_bytes, int ranks);
/// The same by the token, of many tokens.
double bytes_sent_per_row(const Transition& transition, std::int64_t features, std::int64_t element_bytes, int ranks);

}  // namespace flexcore
