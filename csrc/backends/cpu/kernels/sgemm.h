#pragma once

#include <cstdint>

namespace flexcore::cpu {

/// c = alpha * a b, or c += alpha * a b, on row-major float32 matrices whose rows are ld* elements apart.
/// For other kernels: no threads, no allocation. c must not overlap a or b.
struct SgemmArgs {
  std::int64_t m = 0, n = 0, k = 0;  // any of them may be 0; k = 0 gives a product of zeros
  const float* a = nullptr;          // [m, k], or [k, m] when transpose_a
  std::int64_t lda = 0;
  const float* b = nullptr;  // [k, n], or [n, k] when transpose_b
  std::int64_t ldb = 0;
  float* c = nullptr;  // [m, n]
  std::int64_t ldc = 0;
  float alpha = 1.0f;
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;  // c is read only then
};

namespace FLEXCORE_ISA {

/// An element's bits depend on its row of a, its column of b and k: neither on m and n nor on its place in c.
void sgemm(const SgemmArgs& args);

}  // namespace FLEXCORE_ISA
}  // namespace flexcore::cpu
