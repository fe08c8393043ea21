#include "register_loops.h"

#include "backends/cpu/isa.h"

namespace flexcore::bench {

namespace {

// Twelve chains cover two pipelines of up to six cycles. In assembly, because compilers keep such loops in memory or
// fold them.
constexpr int kChains = 12;

template <int kLanes>
constexpr double kFlops = 2.0 * kChains * kLanes;

#if defined(__x86_64__)
void base_loop(std::int64_t steps) {
  asm volatile(
      "xorps %%xmm0, %%xmm0\n"
      "xorps %%xmm1, %%xmm1\n"
      "xorps %%xmm2, %%xmm2\n"
      "xorps %%xmm3, %%xmm3\n"
      "xorps %%xmm4, %%xmm4\n"
      "xorps %%xmm5, %%xmm5\n"
      "xorps %%xmm6, %%xmm6\n"
      "xorps %%xmm7, %%xmm7\n"
      "xorps %%xmm8, %%xmm8\n"
      "xorps %%xmm9, %%xmm9\n"
      "xorps %%xmm10, %%xmm10\n"
      "xorps %%xmm11, %%xmm11\n"
      "xorps %%xmm12, %%xmm12\n"
      "xorps %%xmm13, %%xmm13\n"
      "xorps %%xmm14, %%xmm14\n"
      "xorps %%xmm15, %%xmm15\n"
      "1:\n"
      "mulps %%xmm15, %%xmm0\n"
      "addps %%xmm14, %%xmm0\n"
      "mulps %%xmm15, %%xmm1\n"
      "addps %%xmm14, %%xmm1\n"
      "mulps %%xmm15, %%xmm2\n"
      "addps %%xmm14, %%xmm2\n"
      "mulps %%xmm15, %%xmm3\n"
      "addps %%xmm14, %%xmm3\n"
      "mulps %%xmm15, %%xmm4\n"
      "addps %%xmm14, %%xmm4\n"
      "mulps %%xmm15, %%xmm5\n"
      "addps %%xmm14, %%xmm5\n"
      "mulps %%xmm15, %%xmm6\n"
      "addps %%xmm14, %%xmm6\n"
      "mulps %%xmm15, %%xmm7\n"
      "addps %%xmm14, %%xmm7\n"
      "mulps %%xmm15, %%xmm8\n"
      "addps %%xmm14, %%xmm8\n"
      "mulps %%xmm15, %%xmm9\n"
      "addps %%xmm14, %%xmm9\n"
      "mulps %%xmm15, %%xmm10\n"
      "addps %%xmm14, %%xmm10\n"
      "mulps %%xmm15, %%xmm11\n"
      "addps %%xmm14, %%xmm11\n"
      "dec %0\n"
      "jnz 1b\n"
      : "+r"(steps)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15");
}

void avx2_loop(std::int64_t steps) {
  asm volatile(
      "vzeroall\n"
      "1:\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm0\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm1\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm2\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm3\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm4\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm5\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm6\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm7\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm8\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm9\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm10\n"
      "vfmadd231ps %%ymm14, %%ymm15, %%ymm11\n"
      "dec %0\n"
      "jnz 1b\n"
      "vzeroupper\n"
      : "+r"(steps)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15");
}

void avx512_loop(std::int64_t steps) {
  asm volatile(
      "vzeroall\n"
      "1:\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm0\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm1\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm2\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm3\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm4\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm5\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm6\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm7\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm8\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm9\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm10\n"
      "vfmadd231ps %%zmm14, %%zmm15, %%zmm11\n"
      "dec %0\n"
      "jnz 1b\n"
      "vzeroupper\n"
      : "+r"(steps)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15");
}

void dot_loop(std::int64_t steps) {
  asm volatile(
      "vzeroall\n"
      "1:\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm0\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm1\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm2\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm3\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm4\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm5\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm6\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm7\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm8\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm9\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm10\n"
      "vdpbf16ps %%zmm14, %%zmm15, %%zmm11\n"
      "dec %0\n"
      "jnz 1b\n"
      "vzeroupper\n"
      : "+r"(steps)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15");
}
#else
float kept;  // the loop's result must be wanted by somebody

void base_loop(std::int64_t steps) {
  typedef float Vector __attribute__((vector_size(16)));
  Vector sums[kChains] = {}, scale = {}, term = {};
  scale += 0.999f, term += 0.5f;
  for (std::int64_t i = 0; i < steps; ++i)
    for (auto& sum : sums) sum = sum * scale + term;
  for (const auto& sum : sums) kept += sum[0];
}
#endif

}  // namespace

RegisterLoop float32_loop() {
#if defined(__x86_64__)
  if (cpu::active_isa() >= cpu::Isa::kAvx512) return {avx512_loop, kFlops<16>};
  if (cpu::active_isa() == cpu::Isa::kAvx2) return {avx2_loop, kFlops<8>};
#endif
  return {base_loop, kFlops<4>};
}

RegisterLoop bfloat16_loop() {
#if defined(__x86_64__)
  if (cpu::active_isa() == cpu::Isa::kAvx512Bf16) return {dot_loop, kFlops<32>};
#endif
  return float32_loop();
}

}  // namespace flexcore::bench
