#include "ops/cross_entropy.h"

#include <algorithm>

#include "ops/require.h"

namespace flexcore {

void check(const LinearCrossEntropyArgs& args) {
  constexpr auto op = LinearCrossEntropyArgs::kName;
  require_weight(op, "weight", args.weight);
  require(!args.weight.format.quantized(), op, ": weight is quantised, wanted a dense one");
  const auto rows = args.hidden.ndim() == 2 ? args.hidden.shape(0) : 0;
  require_matrix(op, "hidden", args.hidden, rows, args.weight.in_features);
  require_vector(op, "labels", args.labels, rows, DType::kInt32);
  require_vector(op, "loss", args.loss, rows);
  if (!args.grad_hidden) return;
  require_matrix(op, "grad_hidden", args.grad_hidden, rows, args.weight.in_features);
  require_vector(op, "grad_scale", args.grad_scale, rows);
}

void check(const CrossEntropyArgs& args) {
  constexpr auto op = CrossEntropyArgs::kName;
  require_matrix(op, "logits", args.logits);
  require_dtype(op, "logits", args.logits, DType::kFloat32);
  const auto rows = args.logits.shape(0);
  require(args.logits.shape(1) > 0, op, ": logits is ", args.logits, ", wanted at least one token");
  require_vector(op, "labels", args.labels, rows, DType::kInt32);
  require_vector(op, "loss", args.loss, rows);
  if (args.grad_scale.data() != nullptr) require_vector(op, "grad_scale", args.grad_scale, rows);
}

std::int64_t logit_rows(DeviceKind device, std::int64_t vocab_size) {
  const std::int64_t bytes = device == DeviceKind::kCpu ? std::int64_t{8} << 20 : std::int64_t{256} << 20;
  const std::int64_t rows = bytes / (vocab_size * static_cast<std::int64_t>(sizeof(float)));
  return std::max<std::int64_t>(16, rows / 16 * 16);
}

}  // namespace flexcore
