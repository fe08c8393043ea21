#include "ops/scale.h"

#include "ops/require.h"

namespace flexcore {

namespace {

void require_segments(std::string_view op, std::span<const ScaleSegment> segments, std::int64_t num_tokens,
                      bool gradients) {
  std::int64_t previous_end = 0;
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const auto& s = segments[i];
    require(previous_end <= s.begin && s.begin <= s.end && s.end <= num_tokens, op, ": segment ", i, " is rows [",
            s.begin, ", ", s.end, "), wanted ascending disjoint rows in [", previous_end, ", ", num_tokens, ")");
    previous_end = s.end;
    if (s.begin == s.end) continue;
    require(s.scale != nullptr, op, ": segment ", i, " has no scale");
    require(!gradients || s.grad_scale != nullptr, op, ": segment ", i, " has no grad_scale");
  }
}

}  // namespace

void check(const ScaleArgs& args) {
  constexpr auto op = ScaleArgs::kName;
  require_matrix(op, "x", args.x);
  require_matrix(op, "y", args.y, args.x.shape(0), args.x.shape(1));
  require_dtype(op, "y", args.y, args.x.dtype());
  require_segments(op, args.segments, args.x.shape(0), false);
}

void check(const ScaleBackwardArgs& args) {
  constexpr auto op = ScaleBackwardArgs::kName;
  require_matrix(op, "grad_y", args.grad_y);
  require_matrix(op, "x", args.x, args.grad_y.shape(0), args.grad_y.shape(1));
  require_segments(op, args.segments, args.grad_y.shape(0), true);
  if (args.grad_x) {
    require_matrix(op, "grad_x", args.grad_x, args.grad_y.shape(0), args.grad_y.shape(1));
    require_dtype(op, "grad_x", args.grad_x, args.grad_y.dtype());
  }
}

}  // namespace flexcore
