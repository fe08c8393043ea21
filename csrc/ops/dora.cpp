#include "ops/dora.h"

#include "ops/require.h"

namespace flexcore {

void check(const DoraScaleArgs& args) {
  constexpr auto op = DoraScaleArgs::kName;
  constexpr std::int64_t kMaxRank = 256;
  require_weight(op, "weight", args.weight);
  require(args.lora_a != nullptr && args.lora_b != nullptr, op, ": no lora_a or no lora_b");
  require(1 <= args.rank && args.rank <= kMaxRank, op, ": rank is ", args.rank, ", wanted 1 to ", kMaxRank);
  require_vector(op, "norm", args.norm, args.weight.out_features);
  require_vector(op, "scale", args.scale, args.weight.out_features);
}

}  // namespace flexcore
