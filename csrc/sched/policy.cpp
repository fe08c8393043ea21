#include "sched/policy.h"

#include <charconv>
#include <string_view>

#include "core/check.h"

namespace flexcore {

std::unique_ptr<Policy> make_policy(const std::string& name) {
  const auto colon = name.find(':');
  const std::string_view kind = std::string_view(name).substr(0, colon);
  const bool takes_number = kind == "temporal" || kind == "token-cap";
  std::int64_t number = 0;
  bool valid = takes_number == (colon != std::string::npos);
  if (valid && takes_number) {
    const char* end = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + colon + 1, end, number);
    valid = parsed.ec == std::errc() && parsed.ptr == end && number >= 1;
  }
  if (valid) {
    if (kind == "hybrid") return hybrid_policy();
    if (kind == "temporal") return temporal_policy(number);
    if (kind == "dynamic-temporal") return dynamic_temporal_policy();
    if (kind == "token-cap") return token_cap_policy(number);
    if (kind == "inference-only") return inference_only_policy();
    if (kind == "finetune-only") return finetune_only_policy();
  }
  throw InvalidArgument(str("policy: \"", name, "\", wanted hybrid, temporal:N, dynamic-temporal, token-cap:N, ",
                            "inference-only or finetune-only"));
}

}  // namespace flexcore
