#pragma once

#include <optional>
#include <string>
#include <vector>

#include "engine/impl.h"

namespace flexcore {

/// Coefficients of the step-time model, kept from one engine to the next like it: same model, sizes, dtype, device,
/// threads and version of flexcore. In $FLEXCORE_CACHE, $XDG_CACHE_HOME/flexcore or ~/.cache/flexcore, under
/// step_time/.
class StepTimeFile {
 public:
  StepTimeFile(const ModelConfig& model, const EngineConfig& config, const std::string& device, int num_threads);

  /// Nothing when there is no file, or not one of this kind.
  std::optional<std::vector<double>> load() const;
  /// What cannot be written is measured again another time.
  void save(std::span<const double> coefficients) const noexcept;

 private:
  std::string path_;  // "" where no home is known
  std::string key_;
};

}  // namespace flexcore
