#include <cmath>
#include <cstdint>
#include <vector>

#include "backends/cuda/context.h"
#include "backends/cuda/families.h"
#include "backends/cuda/kernels/optimizer.cuh"
#include "ops/optimizer.h"

namespace flexcore::cuda {

namespace {

template <class... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) % (kOptimizerPack * sizeof(float)) == 0) && ...);
}

/// What a launch over many tensors needs in device memory.
template <class Tensor>
struct TensorTable {
  const Tensor* tensors;
  const TensorChunk* chunks;
  std::int64_t num_chunks;
};

template <class Tensor>
TensorTable<Tensor> upload_table(OpContext& context, const std::vector<Tensor>& tensors) {
  std::vector<TensorChunk> chunks;
  for (std::size_t i = 0; i < tensors.size(); ++i)
    for (std::int64_t begin = 0; begin < tensors[i].size; begin += kOptimizerChunk)
      chunks.push_back({static_cast<std::int32_t>(i), static_cast<std::int32_t>(begin / kOptimizerChunk)});
  return {on_device(context, std::span<const Tensor>(tensors)),
          on_device(context, std::span<const TensorChunk>(chunks)), static_cast<std::int64_t>(chunks.size())};
}

dim3 grid_of(std::int64_t num_chunks) { return dim3(static_cast<unsigned>(num_chunks)); }

void adamw(OpContext& context, const AdamWArgs& args) {
  const Arena::Scope scope(*context.scratch);
  std::vector<AdamWTensor> tensors;
  tensors.reserve(args.tensors.size());
  for (const auto& t : args.tensors)
    tensors.push_back(
        {t.param, t.grad, t.exp_avg, t.exp_avg_sq, t.size, aligned(t.param, t.grad, t.exp_avg, t.exp_avg_sq)});
  const auto table = upload_table(context, tensors);
  if (table.num_chunks == 0) return;
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
  launch(adamw_kernel, grid_of(table.num_chunks), dim3(kOptimizerThreads), 0, handle_of(context), table.tensors,
         table.chunks, constants);
  check_launch(args.kName);
}

void sgd(OpContext& context, const SgdArgs& args) {
  const Arena::Scope scope(*context.scratch);
  std::vector<SgdTensor> tensors;
  tensors.reserve(args.tensors.size());
  for (const auto& t : args.tensors) tensors.push_back({t.param, t.grad, t.size, aligned(t.param, t.grad)});
  const auto table = upload_table(context, tensors);
  if (table.num_chunks == 0) return;
  const SgdStep constants{static_cast<float>(args.learning_rate), static_cast<float>(args.weight_decay),
                          static_cast<float>(args.grad_scale)};
  launch(sgd_kernel, grid_of(table.num_chunks), dim3(kOptimizerThreads), 0, handle_of(context), table.tensors,
         table.chunks, constants);
  check_launch(args.kName);
}

void sum_squares(OpContext& context, const SumSquaresArgs& args) {
  const Arena::Scope scope(*context.scratch);
  std::vector<SquaredTensor> tensors;
  tensors.reserve(args.tensors.size());
  for (const auto& t : args.tensors) tensors.push_back({t.as<const float>(), t.size(), aligned(t.as<const float>())});
  const auto table = upload_table(context, tensors);
  *args.result = 0;
  if (table.num_chunks == 0) return;
  auto* sums = context.scratch->allocate<double>(static_cast<std::size_t>(table.num_chunks) + 1);
  double* result = sums + table.num_chunks;
  launch(sum_squares_kernel, grid_of(table.num_chunks), dim3(kOptimizerThreads), kWarpSize * sizeof(double),
         handle_of(context), table.tensors, table.chunks, sums);
  check_launch(args.kName);
  launch(add_up_kernel, dim3(1), dim3(1024), kWarpSize * sizeof(double), handle_of(context), sums, table.num_chunks,
         result);
  check_launch(args.kName);
  stream_of(context).staging.download(args.result, result, sizeof(double));
}

}  // namespace

void register_optimizer(OpRegistry& registry) {
  registry.add<SumSquaresArgs>(DeviceKind::kCuda, sum_squares);
  registry.add<AdamWArgs>(DeviceKind::kCuda, adamw);
  registry.add<SgdArgs>(DeviceKind::kCuda, sgd);
}

}  // namespace flexcore::cuda
