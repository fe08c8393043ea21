#include "model/archs/archs.h"

#include "core/check.h"

namespace flexcore {

Graph build_model(const ModelConfig& config, DType compute) {
  switch (config.architecture) {
    case Architecture::kLlama:
      return build_llama(config, compute);
    case Architecture::kMistral:
      return build_mistral(config, compute);
    case Architecture::kQwen2:
      return build_qwen2(config, compute);
    case Architecture::kQwen3:
      return build_qwen3(config, compute);
  }
  throw Unsupported(str("architecture ", config.architecture_name));
}

}  // namespace flexcore
