#include "ops/transfer.h"

#include <cstring>

#include "backends/cpu/families.h"

namespace flexcore::cpu {

namespace {

void stage(OpContext&, const StageArgs& args) {
  if (args.bytes > 0) std::memcpy(args.device, args.host, args.bytes);
}

void fetch(OpContext&, const FetchArgs& args) {
  if (args.bytes > 0) std::memcpy(args.host, args.device, args.bytes);
}

}  // namespace

void register_transfer(OpRegistry& registry) {
  registry.add<StageArgs>(DeviceKind::kCpu, stage);
  registry.add<FetchArgs>(DeviceKind::kCpu, fetch);
}

}  // namespace flexcore::cpu
