#include "ops/lora.h"

#include "ops/require.h"

namespace flexcore {

namespace {

constexpr std::int64_t kMaxRank = 256;

// Disjoint, ascending, inside the batch; every matrix there.
void require_segments(std::string_view op, std::size_t member, std::span<const LoraSegment> segments,
                      std::int64_t num_tokens, bool gradients) {
  std::int64_t previous_end = 0;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const auto& s = segments[i];
    require(previous_end <= s.begin && s.begin <= s.end && s.end <= num_tokens, op, ": member ", member, " segment ", i,
            " is rows [", s.begin, ", ", s.end, "), wanted ascending disjoint rows in [", previous_end, ", ",
            num_tokens, ")");
    previous_end = s.end;
    if (s.begin == s.end) continue;
    require(1 <= s.rank && s.rank <= kMaxRank, op, ": member ", member, " segment ", i, " has rank ", s.rank,
            ", wanted 1 to ", kMaxRank);
    require(s.lora_a != nullptr && s.lora_b != nullptr, op, ": member ", member, " segment ", i,
            " has no lora_a or no lora_b");
    require(!gradients || (s.grad_a != nullptr) == (s.grad_b != nullptr), op, ": member ", member, " segment ", i,
            " has only one of grad_a and grad_b");
  }
}

}  // namespace

void check(const LoraArgs& args) {
  constexpr auto op = LoraArgs::kName;
  require_matrix(op, "x", args.x);
  for (std::size_t i = 0; i < args.members.size(); ++i) {
    const auto& [y, segments] = args.members[i];
    require_matrix(op, "y", y);
    require(y.shape(0) == args.x.shape(0), op, ": member ", i, " y is ", y, ", wanted ", args.x.shape(0),
            " rows like x");
    require_segments(op, i, segments, args.x.shape(0), false);
  }
}

void check(const LoraBackwardArgs& args) {
  constexpr auto op = LoraBackwardArgs::kName;
  require_matrix(op, "x", args.x);
  for (std::size_t i = 0; i < args.members.size(); ++i) {
    const auto& [grad_y, segments] = args.members[i];
    require_matrix(op, "grad_y", grad_y);
    require(grad_y.shape(0) == args.x.shape(0), op, ": member ", i, " grad_y is ", grad_y, ", wanted ", args.x.shape(0),
            " rows like x");
    require_segments(op, i, segments, args.x.shape(0), true);
  }
  if (args.grad_x) {
    require_matrix(op, "grad_x", args.grad_x, args.x.shape(0), args.x.shape(1));
    require_dtype(op, "grad_x", args.grad_x, DType::kFloat32);
  }
}

}  // namespace flexcore
