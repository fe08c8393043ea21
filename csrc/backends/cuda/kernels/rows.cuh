#pragma once

#include "backends/cuda/kernels/device.cuh"

namespace flexcore::cuda {

/// A matrix whose rows are float or bf16; stride in elements. The dtype is the same for a whole launch, so that its
/// branch costs one instruction, and no kernel is compiled once per combination of dtypes.
struct Rows {
  void* data = nullptr;
  std::int64_t stride = 0;
  bool is_bf16 = false;

  /// Elements [column, column + N) of a row; for N > 1 they are aligned as `packs_of` says.
  template <int N>
  __device__ __forceinline__ void load(std::int64_t row, std::int64_t column, float (&x)[N]) const {
    const std::int64_t at = row * stride + column;
    if (is_bf16) {
      const auto pack = load_pack<bf16, N>(static_cast<const bf16*>(data) + at);
      FLEXCORE_UNROLL
      for (int i = 0; i < N; ++i) x[i] = to_float(pack.at[i]);
    } else {
      load_floats(static_cast<const float*>(data) + at, x);
    }
  }
  template <int N>
  __device__ __forceinline__ void store(std::int64_t row, std::int64_t column, const float (&x)[N]) const {
    const std::int64_t at = row * stride + column;
    if (is_bf16) {
      Pack<bf16, N> pack;
      FLEXCORE_UNROLL
      for (int i = 0; i < N; ++i) pack.at[i] = from_float<bf16>(x[i]);
      store_pack(static_cast<bf16*>(data) + at, pack);
    } else {
      store_floats(static_cast<float*>(data) + at, x);
    }
  }

  /// Floats go four at a time.
  template <int N>
  static __device__ __forceinline__ void load_floats(const float* data, float (&x)[N]) {
    constexpr int kPart = N < 4 ? N : 4;
    FLEXCORE_UNROLL
    for (int i = 0; i < N; i += kPart) {
      const auto pack = load_pack<float, kPart>(data + i);
      FLEXCORE_UNROLL
      for (int j = 0; j < kPart; ++j) x[i + j] = pack.at[j];
    }
  }
  template <int N>
  static __device__ __forceinline__ void store_floats(float* data, const float (&x)[N]) {
    constexpr int kPart = N < 4 ? N : 4;
    FLEXCORE_UNROLL
    for (int i = 0; i < N; i += kPart) {
      Pack<float, kPart> pack;
      FLEXCORE_UNROLL
      for (int j = 0; j < kPart; ++j) pack.at[j] = x[i + j];
      store_pack(data + i, pack);
    }
  }
};

/// Elements that one thread handles at once where rows allow it.
inline constexpr int kPackElements = 8;

/// Whether packs of kPackElements are whole and aligned in every row.
inline bool packs_of(const Rows& rows, std::int64_t width) {
  return width % kPackElements == 0 && rows.stride % kPackElements == 0 &&
         reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0;
}

}  // namespace flexcore::cuda
