#pragma once

// What every kernel stands on: launching, shared memory, bfloat16, warp and block sums, 16-byte vectors. The same files
// are compiled by nvcc and, for tests without a GPU, by the host's compiler against tests/simt (FLEXCORE_SIMT); this is
// the only file here that knows the difference, with mma.cuh.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace flexcore::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
/// Dynamic shared memory that a block may use on every architecture that is built for (sm_80: 163 KiB, sm_90: 227 KiB).
inline constexpr std::size_t kMostShared = 160 << 10;

/// kernel<<<grid, block, shared_bytes, stream>>>(args...), with the kernel's limit of shared memory raised where
/// needed. Errors are found by cudaGetLastError.
#if defined(FLEXCORE_SIMT)
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
            Args... args) {
  simt::launch_kernel(kernel, grid, block, shared_bytes, stream, static_cast<Params>(args)...);
}
/// The block's dynamic shared memory, 128-byte aligned.
#define FLEXCORE_SHARED(name) unsigned char* const name = ::simt::shared_memory()
#define FLEXCORE_UNROLL
#define FLEXCORE_UNROLL_4
#define FLEXCORE_NO_UNROLL
#else
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
            Args... args) {
  if (shared_bytes > (48 << 10))
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}
#define FLEXCORE_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define FLEXCORE_UNROLL _Pragma("unroll")
#define FLEXCORE_UNROLL_4 _Pragma("unroll 4")   // loads of four rounds in flight
#define FLEXCORE_NO_UNROLL _Pragma("unroll 1")  // registers of one round
#endif

/// Storage type: 16 bits, the upper half of a float.
struct alignas(2) bf16 {
  std::uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

/// Two floats as bfloat16, rounded to nearest even; `low` in the low half. NaN stays NaN.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
#if defined(FLEXCORE_SIMT)
  const auto round = [](float x) {
    const unsigned u = __float_as_uint(x);
    return x != x ? (u >> 16 | 0x40u) : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  };
  return round(low) | round(high) << 16;
#else
  unsigned packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return {static_cast<std::uint16_t>(pack_bf16(x, 0.0f) & 0xffffu)};
}

/// N elements that are loaded and stored at once: 16 bytes where N * sizeof(T) allows. `data` must be aligned to them.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};
template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* data) {
  return *reinterpret_cast<const Pack<T, N>*>(data);
}
template <class T, int N>
__device__ __forceinline__ void store_pack(T* data, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(data) = pack;
}

// Sums over lanes in a fixed order: the same bits at every run. Every lane gets the result.
__device__ __forceinline__ float warp_sum(float x) {
  FLEXCORE_UNROLL
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
__device__ __forceinline__ double warp_sum(double x) {
  FLEXCORE_UNROLL
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  FLEXCORE_UNROLL
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

/// Sum over a block of whole warps; every thread gets it. `slots`: kWarpSize values of shared memory, free again after
/// the next barrier.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* slots) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  x = warp_sum(x);
  if (lane == 0) slots[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? slots[lane] : T{});
}

/// Maximum over a block of whole warps, NaN left out; otherwise as block_sum.
__device__ __forceinline__ float block_max(float x, float* slots) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  x = warp_max(x);
  if (lane == 0) slots[warp] = x;
  __syncthreads();
  return warp_max(slots[lane < warps ? lane : 0]);
}

}  // namespace flexcore::cuda
