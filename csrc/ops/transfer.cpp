#include "ops/transfer.h"

namespace flexcore {

void check(const StageArgs& args) {
  require(args.bytes == 0 || (args.device != nullptr && args.host != nullptr), "stage: a null address");
}

void check(const FetchArgs& args) {
  require(args.bytes == 0 || (args.device != nullptr && args.host != nullptr), "fetch: a null address");
}

}  // namespace flexcore
