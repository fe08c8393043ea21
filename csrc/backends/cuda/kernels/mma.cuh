#pragma once

#include "backends/cuda/kernels/device.cuh"

// Instructions that CUDA C++ has no function for. Under FLEXCORE_SIMT the lanes of a warp meet, leave their fragments
// for the others, and each computes its own results; a deferred copy arrives only at the wait that covers it.

#if defined(FLEXCORE_SIMT)
#define FLEXCORE_UNROLL_2
#else
#define FLEXCORE_UNROLL_2 _Pragma("unroll 2")
#endif

namespace flexcore::cuda {

/// 2^x, relative error 2^-22; results below 2^-126 are zero.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(FLEXCORE_SIMT)
  return x < -126.0f ? 0.0f : exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

/// 16 bytes of global memory on their way to shared memory, both aligned to 16; zeros where not `valid`.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
#if defined(FLEXCORE_SIMT)
  simt::copy_later(shared, global, 16, valid);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(valid ? 16 : 0)
      : "memory");
#endif
}
/// The same for 4 bytes.
__device__ __forceinline__ void cp_async4(void* shared, const void* global, bool valid) {
#if defined(FLEXCORE_SIMT)
  simt::copy_later(shared, global, 4, valid);
#else
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(valid ? 4 : 0)
      : "memory");
#endif
}
/// Closes a group of the thread's copies, which may be empty.
__device__ __forceinline__ void cp_async_commit() {
#if defined(FLEXCORE_SIMT)
  simt::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Waits for all of the thread's groups but the last `Left`. Other threads see them after the next barrier.
template <int Left>
__device__ __forceinline__ void cp_async_wait() {
#if defined(FLEXCORE_SIMT)
  simt::wait_copies(Left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
#endif
}

#if defined(FLEXCORE_SIMT)
namespace emulated {
inline unsigned half_of(const void* row, int element) {
  std::uint16_t bits;
  std::memcpy(&bits, static_cast<const unsigned char*>(row) + 2 * element, 2);
  return bits;
}
/// Lane 8 i + r brings the address of row r of 8 x 8 matrix i.
inline void load_matrices(unsigned (&r)[4], const void* row, bool transposed) {
  simt::require_aligned(row, 16, "ldmatrix");
  simt::meet(kAllLanes, transposed ? "ldmatrix.trans" : "ldmatrix", &row, sizeof row);
  const int lane = simt::lane(), i = lane / 4, j = lane % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    const auto row_of = [&](int k) {
      const void* other;
      std::memcpy(&other, simt::left_by(8 * m + k), sizeof other);
      return other;
    };
    r[m] = transposed ? half_of(row_of(j), i) | half_of(row_of(j + 1), i) << 16
                      : half_of(row_of(i), j) | half_of(row_of(i), j + 1) << 16;
  }
}
}  // namespace emulated
#endif

/// Four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 i + r gives the address of row r of matrix i. Of
/// each, lane l gets elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1).
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
#if defined(FLEXCORE_SIMT)
  emulated::load_matrices(r, row, false);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
#endif
}
/// The same of the matrices' transposes.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void* row) {
#if defined(FLEXCORE_SIMT)
  emulated::load_matrices(r, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
#endif
}

/// c [16, 8] += a [16, 16] b [16, 8], bfloat16 with float32 sums. With i = lane / 4 and j = 2 (lane % 4), two elements
/// side by side in a register: a = {(i, j), (i + 8, j), (i, j + 8), (i + 8, j + 8)}, b = {(j, i), (j + 8, i)} (rows j
/// and j + 1), c = {(i, j), (i, j + 1), (i + 8, j), (i + 8, j + 1)}.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if defined(FLEXCORE_SIMT)
  struct Fragments {
    unsigned a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  simt::meet(kAllLanes, "mma.m16n8k16", &mine, sizeof mine);
  const int lane = simt::lane(), i = lane / 4, j = lane % 4 * 2;
  const auto low = [](unsigned x) { return __uint_as_float(x << 16); };
  const auto high = [](unsigned x) { return __uint_as_float(x & 0xffff0000u); };
  for (int half = 0; half < 2; ++half) {  // of k
    for (int t = 0; t < 4; ++t) {
      const auto* row = static_cast<const Fragments*>(simt::left_by(4 * i + t));
      const auto* first = static_cast<const Fragments*>(simt::left_by(4 * j + t));
      const auto* second = static_cast<const Fragments*>(simt::left_by(4 * j + 4 + t));
      const unsigned top = row->a[2 * half], bottom = row->a[2 * half + 1];
      const unsigned x = first->b[half], y = second->b[half];
      c[0] += low(top) * low(x), c[0] += high(top) * high(x);
      c[1] += low(top) * low(y), c[1] += high(top) * high(y);
      c[2] += low(bottom) * low(x), c[2] += high(bottom) * high(x);
      c[3] += low(bottom) * low(y), c[3] += high(bottom) * high(y);
    }
  }
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace flexcore::cuda
