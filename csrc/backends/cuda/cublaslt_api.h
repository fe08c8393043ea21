#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// The few declarations of cuBLASLt that cublaslt.cpp needs, so that flexcore builds without its headers and loads the
// library when a GPU first multiplies. Names and values are those of cublasLt.h and cublas_api.h, CUDA 12 and 13.
namespace flexcore::cuda::lt {

using Status = int;                          // 0: success
inline constexpr Status kNotSupported = 15;  // CUBLAS_STATUS_NOT_SUPPORTED
using Handle = struct HandleOpaque*;
using MatmulDesc = struct MatmulDescOpaque*;
using MatrixLayout = struct MatrixLayoutOpaque*;
using Preference = struct PreferenceOpaque*;

inline constexpr int kReal32F = 0, kReal16BF = 14;  // cudaDataType
inline constexpr int kCompute32F = 68;              // CUBLAS_COMPUTE_32F
inline constexpr std::int32_t kTranspose = 1;       // CUBLAS_OP_T
inline constexpr int kDescTransA = 3, kDescTransB = 4, kDescEpilogue = 7,
                     kDescBiasPointer = 8;        // CUBLASLT_MATMUL_DESC_*
inline constexpr std::int32_t kEpilogueBias = 4;  // CUBLASLT_EPILOGUE_BIAS
// CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, _REDUCTION_SCHEME_MASK, then _MIN_ALIGNMENT_A_BYTES to _D_BYTES
inline constexpr int kPreferenceWorkspace = 1, kPreferenceReductions = 3, kPreferenceAlignment = 5;
inline constexpr std::uint32_t kNoReduction = 0;  // CUBLASLT_REDUCTION_SCHEME_NONE

struct Algorithm {
  std::uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  std::size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};

/// The library's functions, each under its name without the prefix cublasLt.
struct Api {
  Status (*Create)(Handle*);
  Status (*Destroy)(Handle);
  const char* (*GetStatusString)(Status);
  Status (*MatmulDescCreate)(MatmulDesc*, int compute_type, int scale_type);
  Status (*MatmulDescDestroy)(MatmulDesc);
  Status (*MatmulDescSetAttribute)(MatmulDesc, int attribute, const void* value, std::size_t bytes);
  Status (*MatrixLayoutCreate)(MatrixLayout*, int type, std::uint64_t rows, std::uint64_t columns, std::int64_t ld);
  Status (*MatrixLayoutDestroy)(MatrixLayout);
  Status (*MatmulPreferenceCreate)(Preference*);
  Status (*MatmulPreferenceDestroy)(Preference);
  Status (*MatmulPreferenceSetAttribute)(Preference, int attribute, const void* value, std::size_t bytes);
  Status (*MatmulAlgoGetHeuristic)(Handle, MatmulDesc, MatrixLayout, MatrixLayout, MatrixLayout, MatrixLayout,
                                   Preference, int requested, Heuristic* results, int* returned);
  Status (*MatmulAlgoCheck)(Handle, MatmulDesc, MatrixLayout, MatrixLayout, MatrixLayout, MatrixLayout,
                            const Algorithm*, Heuristic* result);
  Status (*Matmul)(Handle, MatmulDesc, const void* alpha, const void* a, MatrixLayout, const void* b, MatrixLayout,
                   const void* beta, const void* c, MatrixLayout, void* d, MatrixLayout, const Algorithm*,
                   void* workspace, std::size_t workspace_bytes, cudaStream_t);
};

/// Loads the library once for the process. Throws DeviceError that says what was looked for.
const Api& api();

}  // namespace flexcore::cuda::lt
