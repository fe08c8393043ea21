#include "train/job.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <utility>

#include "core/check.h"
#include "core/number.h"
#include "core/philox.h"
#include "ops/optimizer.h"
#include "ops/scatter.h"

namespace flexcore {

double learning_rate_at(const FinetuneConfig& config, std::int64_t step, std::int64_t total) {
  const double peak = config.learning_rate;
  const auto warmup = static_cast<std::int64_t>(std::ceil(config.warmup_ratio * static_cast<double>(total)));
  if (step < warmup) return peak * static_cast<double>(step) / static_cast<double>(std::max<std::int64_t>(1, warmup));
  if (config.lr_scheduler == "constant") return peak;
  const double progress =
      static_cast<double>(step - warmup) / static_cast<double>(std::max<std::int64_t>(1, total - warmup));
  if (config.lr_scheduler == "linear") return peak * std::max(0.0, 1.0 - progress);
  return peak * std::max(0.0, 0.5 * (1.0 + std::cos(std::numbers::pi * progress)));
}

namespace {

double sum_squares(OpContext& context, const TensorView& tensor) {
  double squares = 0.0;
  run(context, SumSquaresArgs{{&tensor, 1}, &squares});
  return squares;
}

}  // namespace

void check(const FinetuneConfig& c) {
  constexpr std::int64_t kMaxEpochs = std::numeric_limits<std::int32_t>::max();  // times any examples fits 64 bits
  const auto positive = [](std::int64_t value, const char* name) {
    require(value >= 1, name, ": ", value, ", wanted >= 1");
  };
  require(c.num_epochs >= 1 && c.num_epochs <= kMaxEpochs, "num_epochs: ", c.num_epochs, ", wanted 1 to ", kMaxEpochs);
  positive(c.batch_size, "batch_size");
  require(fits_float(c.learning_rate) && c.learning_rate >= 0, "learning_rate: ", c.learning_rate,
          ", wanted >= 0 and finite as float32");
  require(c.optimizer == "adamw" || c.optimizer == "sgd", "optimizer: \"", c.optimizer,
          "\", wanted \"adamw\" or \"sgd\"");
  require(c.lr_scheduler == "constant" || c.lr_scheduler == "linear" || c.lr_scheduler == "cosine", "lr_scheduler: \"",
          c.lr_scheduler, "\", wanted \"constant\", \"linear\" or \"cosine\"");
  require(fits_float(c.weight_decay) && c.weight_decay >= 0, "weight_decay: ", c.weight_decay,
          ", wanted >= 0 and finite as float32");
  for (const double beta : c.betas)
    require(beta >= 0 && static_cast<float>(beta) < 1, "betas: ", beta, ", wanted in [0, 1), as float32 too");
  require(fits_float(c.eps) && static_cast<float>(c.eps) > 0, "eps: ", c.eps, ", wanted > 0 and finite as float32");
  require(std::isfinite(c.max_grad_norm) && c.max_grad_norm >= 0, "max_grad_norm: ", c.max_grad_norm,
          ", wanted >= 0 and finite (0: no clipping)");
  require(c.warmup_ratio >= 0 && c.warmup_ratio <= 1, "warmup_ratio: ", c.warmup_ratio, ", wanted in [0, 1]");
  require(std::isfinite(c.weight) && c.weight > 0, "weight: ", c.weight, ", wanted > 0");
  if (c.window_tokens) positive(*c.window_tokens, "window_tokens");
  if (c.backward_window_tokens) positive(*c.backward_window_tokens, "backward_window_tokens");
}

std::int64_t steps_per_epoch(const FinetuneConfig& config, std::int64_t num_examples) {
  return 1 + (num_examples - 1) / config.batch_size;
}

TrainingJob::TrainingJob(JobId id_, std::string adapter_, std::vector<Example> examples_, const FinetuneConfig& config_)
    : id(id_),
      adapter(std::move(adapter_)),
      num_examples(static_cast<std::int64_t>(examples_.size())),
      examples(std::move(examples_)),
      config(config_) {
  require(num_examples > 0, "examples: empty, wanted at least one");
}

std::vector<std::int64_t> TrainingJob::batch() const {
  std::vector<std::int64_t> order(static_cast<std::size_t>(num_examples));
  std::iota(order.begin(), order.end(), 0);
  if (config.shuffle) {
    // Fisher-Yates from (seed, epoch) alone, so that a resumed job sees the same order.
    for (std::int64_t i = num_examples - 1; i > 0; --i) {
      const auto counter = (static_cast<std::uint64_t>(epoch()) << 32) | static_cast<std::uint64_t>(i);
      const auto other = random_bits(config.seed, counter) % static_cast<std::uint64_t>(i + 1);
      std::swap(order[static_cast<std::size_t>(i)], order[other]);
    }
  }
  const std::int64_t begin = step % steps_per_epoch() * config.batch_size;
  const std::int64_t count = std::min(config.batch_size, num_examples - begin);
  return {order.begin() + begin, order.begin() + begin + count};
}

void TrainingJob::allocate(OpContext& context, Allocator& allocator, MemoryLedger& ledger,
                           std::int64_t num_parameters) {
  if (num_parameters_ == num_parameters) return;
  const auto bytes = static_cast<std::size_t>(num_parameters) * sizeof(float);
  gradients_ = Buffer(allocator, ledger, MemoryTag::kGradients, bytes);
  if (config.optimizer == "adamw") optimizer_ = Buffer(allocator, ledger, MemoryTag::kOptimizer, 2 * bytes);
  num_parameters_ = num_parameters;
  run(context, ZeroArgs{gradient_view()});
  if (optimizer_) run(context, ZeroArgs{optimizer_view()});
}

TensorView TrainingJob::gradient_view() const { return gradients_.view(DType::kFloat32, {num_parameters_}); }

TensorView TrainingJob::optimizer_view() const {
  return optimizer_ ? optimizer_.view(DType::kFloat32, {2, num_parameters_}) : TensorView{};
}

std::vector<float> TrainingJob::download_optimizer() const {
  std::vector<float> host(optimizer_.bytes() / sizeof(float));
  if (optimizer_) optimizer_.allocator().download(host.data(), optimizer_.data(), optimizer_.bytes());
  return host;
}

void TrainingJob::upload_optimizer(std::int64_t row, const void* values) {
  const TensorView part = optimizer_view().rows(row, row + 1);
  optimizer_.allocator().upload(part.data(), values, part.bytes());
}

void TrainingJob::release() {
  sequences.clear();
  gradients_.reset();
  optimizer_.reset();
  examples = std::vector<Example>();
  num_parameters_ = 0;
}

double TrainingJob::optimizer_step(OpContext& context, const Adapter& target) {
  const TensorView all = gradient_view();
  const double norm = std::sqrt(sum_squares(context, all));
  require<Error>(std::isfinite(norm), "gradient norm is ", norm, " at optimizer step ", step);
  // torch.nn.utils.clip_grad_norm_: the coefficient is max_norm / (norm + 1e-6), at most 1.
  const double clip = config.max_grad_norm > 0 ? std::min(1.0, config.max_grad_norm / (norm + 1e-6)) : 1.0;
  const auto rate = static_cast<float>(learning_rate());
  const auto decay = static_cast<float>(config.weight_decay);
  if (config.optimizer == "adamw") {
    auto* moments = optimizer_view().as<float>();
    const AdamWArgs::Tensor tensor{target.parameters(), gradients(), moments, moments + num_parameters_,
                                   num_parameters_};
    run(context, AdamWArgs{{&tensor, 1},
                           step + 1,
                           rate,
                           static_cast<float>(config.betas[0]),
                           static_cast<float>(config.betas[1]),
                           static_cast<float>(config.eps),
                           decay,
                           static_cast<float>(clip)});
  } else {
    const SgdArgs::Tensor tensor{target.parameters(), gradients(), num_parameters_};
    run(context, SgdArgs{{&tensor, 1}, rate, decay, static_cast<float>(clip)});
  }
  const double size = sum_squares(context, TensorView(target.parameters(), DType::kFloat32, {num_parameters_}));
  require<Error>(std::isfinite(size), "the parameters are not finite after optimizer step ", step,
                 "; a smaller learning_rate or max_grad_norm may help");
  run(context, ZeroArgs{all});
  ++step;
  return norm;
}

}  // namespace flexcore
