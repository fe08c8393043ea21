#include "ops/optimizer.h"

#include <algorithm>
#include <cmath>
#include <span>

#include "backends/cpu/families.h"
#include "backends/cpu/kernels/optimizer.h"

namespace flexcore::cpu {

namespace {

// Elements of one task. Sums of squares are cut here, so it is part of their arithmetic.
constexpr std::int64_t kChunk = 16384;

std::int64_t chunks_of(std::int64_t size) { return (size + kChunk - 1) / kChunk; }

/// body(tensor, begin, end, chunk) for the chunks of all tensors, numbered through. `size_of(i)`: elements of tensor i.
template <class SizeOf, class Body>
void for_chunks(OpContext& context, std::size_t num_tensors, SizeOf&& size_of, Body&& body) {
  const Arena::Scope scope(*context.scratch);
  auto* ends = context.scratch->allocate<std::int64_t>(num_tensors);
  std::int64_t total = 0;
  for (std::size_t i = 0; i < num_tensors; ++i) ends[i] = total += chunks_of(size_of(i));
  context.threads->parallel_for(total, 1, [&](std::int64_t first, std::int64_t last, int) {
    std::size_t i = std::upper_bound(ends, ends + num_tensors, first) - ends;
    for (std::int64_t chunk = first; chunk < last; ++chunk) {
      while (chunk >= ends[i]) ++i;
      const std::int64_t begin = (chunk - (i > 0 ? ends[i - 1] : 0)) * kChunk;
      body(i, begin, std::min(begin + kChunk, size_of(i)), chunk);
    }
  });
}

void sum_squares(OpContext& context, const SumSquaresArgs& args) {
  const Arena::Scope scope(*context.scratch);
  const auto size_of = [&](std::size_t i) { return args.tensors[i].size(); };
  std::int64_t total = 0;
  for (std::size_t i = 0; i < args.tensors.size(); ++i) total += chunks_of(size_of(i));
  const std::span sums(context.scratch->allocate<double>(total), static_cast<std::size_t>(total));
  for_chunks(context, args.tensors.size(), size_of,
             [&](std::size_t i, std::int64_t begin, std::int64_t end, std::int64_t chunk) {
               sums[chunk] = optimizer_kernels().sum_squares(args.tensors[i].as<const float>() + begin, end - begin);
             });
  double result = 0;
  for (const double sum : sums) result += sum;
  *args.result = result;
}

void adamw(OpContext& context, const AdamWArgs& args) {
  const auto step = static_cast<double>(args.step);
  const AdamWStep constants{
      .grad_scale = static_cast<float>(args.grad_scale),
      .decay = static_cast<float>(1 - args.learning_rate * args.weight_decay),
      .one_minus_beta1 = static_cast<float>(1 - args.beta1),
      .beta2 = static_cast<float>(args.beta2),
      .one_minus_beta2 = static_cast<float>(1 - args.beta2),
      .sqrt_correction2 = static_cast<float>(std::sqrt(1 - std::pow(args.beta2, step))),
      .eps = static_cast<float>(args.eps),
      .step_size = static_cast<float>(args.learning_rate / (1 - std::pow(args.beta1, step))),
  };
  for_chunks(
      context, args.tensors.size(), [&](std::size_t i) { return args.tensors[i].size; },
      [&](std::size_t i, std::int64_t begin, std::int64_t end, std::int64_t) {
        const auto& t = args.tensors[i];
        optimizer_kernels().adamw(constants, t.param + begin, t.grad + begin, t.exp_avg + begin, t.exp_avg_sq + begin,
                                  end - begin);
      });
}

void sgd(OpContext& context, const SgdArgs& args) {
  for_chunks(
      context, args.tensors.size(), [&](std::size_t i) { return args.tensors[i].size; },
      [&](std::size_t i, std::int64_t begin, std::int64_t end, std::int64_t) {
        const auto& t = args.tensors[i];
        optimizer_kernels().sgd(static_cast<float>(args.learning_rate), static_cast<float>(args.weight_decay),
                                static_cast<float>(args.grad_scale), t.param + begin, t.grad + begin, end - begin);
      });
}

}  // namespace

void register_optimizer(OpRegistry& registry) {
  registry.add<SumSquaresArgs>(DeviceKind::kCpu, sum_squares);
  registry.add<AdamWArgs>(DeviceKind::kCpu, adamw);
  registry.add<SgdArgs>(DeviceKind::kCpu, sgd);
}

}  // namespace flexcore::cpu
