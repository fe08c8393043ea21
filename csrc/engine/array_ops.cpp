#include "engine/array_ops.h"

#include "flexcore/ops.h"
#include "ops/cross_entropy.h"
#include "ops/norm.h"
#include "ops/optimizer.h"
#include "ops/require.h"
#include "ops/rotary.h"
#include "ops/sampling.h"
#include "ops/silu_mul.h"
#include "ops/transfer.h"

namespace flexcore::ops {

Runtime::Runtime(int num_threads, Device device) : impl_(std::make_unique<Impl>(num_threads, device)) {}
Runtime::~Runtime() = default;
Runtime::Runtime(Runtime&&) noexcept = default;
Runtime& Runtime::operator=(Runtime&&) noexcept = default;
int Runtime::num_threads() const { return impl_->threads.size(); }
Device Runtime::device() const { return impl_->context.device; }

void Runtime::synchronously(const std::function<void()>& body) {
  const auto entered = impl_->device->enter();
  impl_->device->synchronize_with_others();
  try {
    body();
  } catch (...) {
    try {
      impl_->device->synchronize();  // what was started still uses the caller's arrays
    } catch (const Error&) {         // the first error is the one to tell
    }
    throw;
  }
  impl_->device->synchronize();
}

void Runtime::download(void* host, const void* device, std::size_t bytes) {
  impl_->device->allocator().download(host, device, bytes);
}

void rms_norm(Runtime& runtime, const TensorView& x, const TensorView& weight, const TensorView& y, float eps) {
  run_op(runtime, RmsNormArgs{x, weight, y, eps});
}

void rms_norm_backward(Runtime& runtime, const TensorView& grad_y, const TensorView& x, const TensorView& weight,
                       const TensorView& grad_x, float eps) {
  run_op(runtime, RmsNormBackwardArgs{grad_y, x, weight, grad_x, eps});
}

void rotary(Runtime& runtime, const TensorView& x, const TensorView& positions, const TensorView& cos,
            const TensorView& sin, const TensorView& y, bool inverse) {
  run_op(runtime, RotaryArgs{x, y, positions, cos, sin, inverse});
}

void silu_mul(Runtime& runtime, const TensorView& gate, const TensorView& up, const TensorView& y) {
  run_op(runtime, SiluMulArgs{gate, up, y});
}

void silu_mul_backward(Runtime& runtime, const TensorView& grad_y, const TensorView& gate, const TensorView& up,
                       const TensorView& grad_gate, const TensorView& grad_up) {
  run_op(runtime, SiluMulBackwardArgs{grad_y, gate, up, grad_gate, grad_up});
}

void linear_cross_entropy(Runtime& runtime, const TensorView& hidden, const TensorView& weight,
                          const TensorView& labels, const TensorView& grad_scale, const TensorView& loss,
                          const TensorView& grad_hidden) {
  run_op(runtime, LinearCrossEntropyArgs{hidden, plain_weight(LinearCrossEntropyArgs::kName, weight), labels, loss,
                                         grad_scale, grad_hidden});
}

void adamw(Runtime& runtime, const TensorView& param, const TensorView& grad, const TensorView& exp_avg,
           const TensorView& exp_avg_sq, const AdamW& options) {
  constexpr auto op = AdamWArgs::kName;
  const auto require_state = [&](std::string_view name, const TensorView& t) {
    require_dtype(op, name, t, DType::kFloat32);
    require_contiguous(op, name, t);
    require_like(op, name, t, "param", param);
  };
  require_state("param", param);
  require_state("grad", grad);
  require_state("exp_avg", exp_avg);
  require_state("exp_avg_sq", exp_avg_sq);
  const AdamWArgs::Tensor tensor{param.as<float>(), grad.as<const float>(), exp_avg.as<float>(), exp_avg_sq.as<float>(),
                                 param.size()};
  run_op(runtime, AdamWArgs{.tensors = {&tensor, 1},
                            .step = options.step,
                            .learning_rate = options.learning_rate,
                            .beta1 = options.beta1,
                            .beta2 = options.beta2,
                            .eps = options.eps,
                            .weight_decay = options.weight_decay,
                            .grad_scale = options.grad_scale});
}

void sample(Runtime& runtime, const TensorView& logits, const Sampling& options, const TensorView& tokens,
            const TensorView& logprobs) {
  constexpr auto op = SampleArgs::kName;
  require_matrix(op, "logits", logits);
  const std::int64_t count = logits.shape(0);
  require_vector(op, "tokens", tokens, count, DType::kInt32);
  require_vector(op, "logprobs", logprobs, count);
  std::vector<SamplingRow> rows(count);
  for (std::int64_t i = 0; i < count; ++i) {
    rows[i].temperature = options.temperature;
    rows[i].top_k = options.top_k;
    rows[i].top_p = options.top_p;
    rows[i].min_p = options.min_p;
    rows[i].seed = options.seed;
    rows[i].counter = options.counter + static_cast<std::uint64_t>(i);
  }
  std::vector<SamplingResult> results(count);
  run_op(runtime, SampleArgs{logits, rows, results});  // no backend of today changes the logits
  std::vector<std::int32_t> ids;
  std::vector<float> values;
  for (const auto& result : results) {
    ids.push_back(result.token);
    values.push_back(result.logprob);
  }
  run_op(runtime, StageArgs{tokens.data(), ids.data(), tokens.bytes()});
  run_op(runtime, StageArgs{logprobs.data(), values.data(), logprobs.bytes()});
}

}  // namespace flexcore::ops
