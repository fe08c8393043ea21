#include "backends/cpu/scratch.h"

#include <algorithm>

namespace flexcore::cpu {

std::int64_t scratch_bytes(const ScratchShape& s) {
  constexpr std::int64_t kLeast = 1 << 20;  // for what is a few bytes a row or a chunk: elementwise, optimizers
  return kLeast +
         std::max({linear_scratch(s.rows, s.widest_input(), s.widest_outputs(), s.num_threads, s.quantized),
                   lora_scratch(s), linear_scratch(s.sampled_rows, s.hidden_size, 0, s.num_threads, false),
                   attention_scratch(s), cross_entropy_scratch(s), adapted_output_scratch(s), sampling_scratch(s)});
}

}  // namespace flexcore::cpu
