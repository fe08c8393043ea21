#include "backends/cuda/scratch.h"

#include "backends/cuda/context.h"
#include "backends/register.h"

namespace flexcore {

namespace cuda {

namespace {

// A plan for a machine without a GPU is one for an H200.
DeviceSize size_of(int index) {
  cudaDeviceProp properties;
  if (index < num_cuda_devices() && cudaGetDeviceProperties(&properties, index) == cudaSuccess)
    return {properties.multiProcessorCount, properties.l2CacheSize};
  return {132, std::int64_t{60} << 20};
}

}  // namespace

}  // namespace cuda

std::int64_t cuda_memory_bytes(int index) {
  cudaDeviceProp properties;
  if (index < num_cuda_devices() && cudaGetDeviceProperties(&properties, index) == cudaSuccess)
    return static_cast<std::int64_t>(properties.totalGlobalMem);
  return std::int64_t{139} << 30;
}

ScratchBytes cuda_scratch_bytes(int index, const ScratchShape& s) {
  constexpr std::int64_t kLeast = 1 << 20;  // for what is a few bytes a row or a chunk: elementwise, optimizers
  const cuda::DeviceSize device = cuda::size_of(index);
  const std::int64_t tables = cuda::attention_tables_bytes(s, device);
  return {kLeast + tables +
              std::max({cuda::linear_scratch(s), cuda::attention_scratch(s, device), cuda::lora_scratch(s, false),
                        cuda::cross_entropy_scratch(s, device), cuda::adapted_output_scratch(s),
                        cuda::sampling_scratch(s, device)}),
          kLeast + tables +
              std::max({cuda::linear_scratch(s), cuda::attention_scratch(s, device), cuda::lora_scratch(s, true)})};
}

}  // namespace flexcore
