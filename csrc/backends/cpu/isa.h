#pragma once

namespace flexcore::cpu {

/// Instruction sets that kernels/ is compiled for, worst to best.
enum class Isa { kBase, kAvx2, kAvx512, kAvx512Bf16 };

/// The best that this machine has. The environment variable FLEXCORE_ISA (base, avx2, avx512,
/// avx512_bf16) lowers it, for tests.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace flexcore::cpu

// Declares one function table per instruction set, and `name()`, which picks the active one. Kernel files define
// `const Table& flexcore::cpu::FLEXCORE_ISA::name()`. Kernels take raw pointers and sizes, include only kernels/
// headers and core/bfloat16.h, and call no inline function of the standard library: the linker may keep any instruction
// set's copy of it.
#ifdef FLEXCORE_X86_KERNELS
#define FLEXCORE_KERNEL_TABLE(Table, name) \
  namespace base {                         \
  const Table& name();                     \
  }                                        \
  namespace avx2 {                         \
  const Table& name();                     \
  }                                        \
  namespace avx512 {                       \
  const Table& name();                     \
  }                                        \
  namespace avx512_bf16 {                  \
  const Table& name();                     \
  }                                        \
  inline const Table& name() {             \
    switch (active_isa()) {                \
      case Isa::kAvx512Bf16:               \
        return avx512_bf16::name();        \
      case Isa::kAvx512:                   \
        return avx512::name();             \
      case Isa::kAvx2:                     \
        return avx2::name();               \
      default:                             \
        return base::name();               \
    }                                      \
  }
#else
#define FLEXCORE_KERNEL_TABLE(Table, name) \
  namespace base {                         \
  const Table& name();                     \
  }                                        \
  inline const Table& name() { return base::name(); }
#endif
