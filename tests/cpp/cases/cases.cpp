#include "cases/op_case.h"

namespace flexcore::cases {

std::vector<CaseSpec> all_cases() {
  std::vector<CaseSpec> table;
  for (const auto add : {add_linear_cases, add_lora_cases, add_attention_cases, add_elementwise_cases,
                         add_cross_entropy_cases, add_sampling_cases, add_optimizer_cases})
    add(table);
  return table;
}

}  // namespace flexcore::cases
