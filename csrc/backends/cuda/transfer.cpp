#include "ops/transfer.h"

#include "backends/cuda/context.h"
#include "backends/cuda/families.h"

namespace flexcore::cuda {

namespace {

void stage(OpContext& context, const StageArgs& args) {
  if (args.bytes > 0) stream_of(context).staging.upload(args.device, args.host, args.bytes);
}

void fetch(OpContext& context, const FetchArgs& args) {
  if (args.bytes > 0)
    require_cuda(cudaMemcpyAsync(args.host, args.device, args.bytes, cudaMemcpyDeviceToHost, handle_of(context)),
                 "cudaMemcpyAsync");
}

}  // namespace

void register_transfer(OpRegistry& registry) {
  registry.add<StageArgs>(DeviceKind::kCuda, stage);
  registry.add<FetchArgs>(DeviceKind::kCuda, fetch);
}

}  // namespace flexcore::cuda
