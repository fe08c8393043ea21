#pragma once

#include <type_traits>

#include "backends/cuda/kernels/mma.cuh"
#include "backends/cuda/kernels/rows.cuh"

// Tiles and products of the LoRA kernels. All three products (shrink, expand, gradient) have one side that comes from
// activations (P) and one from the ranks of several adapters side by side, a "stack": 64 columns, filled up with
// zeros. A block of 8 warps computes C [128, 64] = P [128, k] Q [64, k]^T, 64 or 32 of k at a time.

namespace flexcore::cuda {

/// How products are formed. Sums are float32 always.
enum class LoraMode : std::uint8_t {
  kExact,  // float32 operands, FMA
  kBf16,   // P is bfloat16 as it is; Q = high + low, two bfloat16 numbers that keep 16 bits of each float32: two mma
  kSplit,  // P and Q split so: three mma (low * low is below float32's own rounding of the sum)
};

inline constexpr int kLoraThreads = 256;
inline constexpr int kLoraM = 128, kLoraN = 64, kLoraK = 64;
/// Expand's k, ranks, is short: stacks of 32 columns there.
inline constexpr int kLoraExpandDepth = 32;
/// Distance between rows of C in shared memory: its fragments are stored without bank conflicts.
inline constexpr int kLoraCStride = 72;

/// Ranks [0, ranks) of one adapter's matrix that lie in columns [column, column + ranks) of a stack; column % 4 == 0.
struct LoraPart {
  float* matrix;  // A, B or their gradients: element (rank i, feature f) is matrix[i rank_step + f feature_step]
  std::int64_t rank_step;     // A: in_features. B: 1
  std::int64_t feature_step;  // A: 1. B: the adapter's rank
  float* u;                   // rank-r intermediate: (row, i) is the sum over s < slabs of
  std::int64_t u_stride;      //   u[(row - first_row) u_stride + i + s slab]
  std::int64_t first_row, slab;
  int slabs;
  float scale;
  int column = 0, ranks = 0;
  bool add = false;  // gradients: to the matrix; else it is a slab of its own
};

/// Parts side by side; columns <= kLoraN, or kLoraExpandDepth. `packs`: every four neighbours of its matrices, which
/// lie along the features of A and along the ranks of B, are whole and aligned to 16 bytes.
struct LoraStack {
  int first_part, num_parts, columns;
  bool packs;
};

/// One column of a stack, in shared memory. A column of no part has valid = 0.
struct LoraColumn {
  float* matrix;
  std::int64_t feature_step;
  float* u;
  std::int64_t u_stride, first_row, slab;
  int slabs, valid;  // valid: this column and how many after it, up to 4 in all, are neighbours in one part
  float scale;
  bool add;
  int unused[2] = {};  // 72 bytes: every fourth column begins in another bank

  __device__ __forceinline__ float* u_row(std::int64_t row) const { return u + (row - first_row) * u_stride; }
};

static_assert(sizeof(LoraColumn) == 72);

/// Spreads a stack's parts over `count` columns. Readers need a barrier first.
__device__ __forceinline__ void spread_columns(const LoraStack& stack, const LoraPart* parts, LoraColumn* columns,
                                               int count = kLoraN) {
  for (int c = static_cast<int>(threadIdx.x); c < count; c += kLoraThreads) {
    LoraColumn column;
    for (int p = 0; p < stack.num_parts; ++p) {
      const LoraPart& part = parts[stack.first_part + p];
      const int i = c - part.column;
      const bool here = i >= 0 && i < part.ranks;
      if (!here && p > 0) continue;
      // Columns of no part have addresses too, of the first one.
      const int left = part.ranks - i, rank = here ? i : 0;
      column = {part.matrix + rank * part.rank_step,
                part.feature_step,
                part.u + rank,
                part.u_stride,
                part.first_row,
                part.slab,
                part.slabs,
                !here      ? 0
                : left < 4 ? left
                           : 4,
                part.scale,
                part.add};
      if (here) break;
    }
    columns[c] = column;
  }
}

/// Four floats, the last 4 - valid of them zero. `packs`: they are aligned, and valid is 0 or 4.
template <bool packs>
__device__ __forceinline__ Pack<float, 4> load_quad(const float* data, int valid) {
  Pack<float, 4> x{};
  if constexpr (packs) {
    if (valid > 0) x = load_pack<float, 4>(data);
  } else {
    FLEXCORE_UNROLL
    for (int i = 0; i < 4; ++i)
      if (i < valid) x.at[i] = data[i];
  }
  return x;
}

/// Where the elements of an [outer, inner] tile lie in shared memory: one plane of floats, or one or two of bfloat16.
/// Rows are 16 bytes longer than needed, so that eight of them lie in different banks.
template <LoraMode mode, int kInner>
struct LoraLayout {
  static constexpr int kStride = kInner + (mode == LoraMode::kExact ? 4 : 8);
  static constexpr int kElement = mode == LoraMode::kExact ? 4 : 2;
  static __host__ __device__ constexpr int plane_bytes(int outer) { return outer * kStride * kElement; }

  /// Four floats at (outer, inner); `low`: distance in bytes to the plane of what the first plane has rounded off.
  static __device__ __forceinline__ void put(unsigned char* tile, int low, int outer, int inner,
                                             const Pack<float, 4>& x) {
    unsigned char* at = tile + (outer * kStride + inner) * kElement;
    if constexpr (mode == LoraMode::kExact) {
      store_pack(reinterpret_cast<float*>(at), x);
    } else {
      Pack<unsigned, 2> high, rest;
      FLEXCORE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const float a = x.at[2 * i], b = x.at[2 * i + 1];
        high.at[i] = pack_bf16(a, b);
        rest.at[i] = pack_bf16(a - __uint_as_float(high.at[i] << 16), b - __uint_as_float(high.at[i] & 0xffff0000u));
      }
      store_pack(reinterpret_cast<unsigned*>(at), high);
      store_pack(reinterpret_cast<unsigned*>(at + low), rest);
    }
  }
};

/// The Q side of a product, [64 columns of C, k], or, turned, [k, 64 columns of C]; on its way from global to shared
/// memory in registers.
template <LoraMode mode, bool turned, int kDepth>
struct LoraQTile {
  static constexpr int kOuter = turned ? kDepth : kLoraN, kInner = turned ? kLoraN : kDepth;
  using Layout = LoraLayout<mode, kInner>;
  static constexpr int kLow = Layout::plane_bytes(kOuter);
  static constexpr int kBytes = kLow * (mode == LoraMode::kExact ? 1 : 2);
  static constexpr int kQuads = kOuter * kInner / 4 / kLoraThreads;
  Pack<float, 4> quads[kQuads];

  static __device__ __forceinline__ int outer_of(int i) {
    return (static_cast<int>(threadIdx.x) + i * kLoraThreads) / (kInner / 4);
  }
  static __device__ __forceinline__ int inner_of() { return static_cast<int>(threadIdx.x) % (kInner / 4) * 4; }

  /// [columns, features from `feature` on]: features are neighbours in memory.
  __device__ __forceinline__ void fetch_along(const LoraColumn* columns, bool packs, std::int64_t feature,
                                              std::int64_t width) {
    packs ? fetch_along_in<true>(columns, feature, width) : fetch_along_in<false>(columns, feature, width);
  }
  /// [features from `feature` on, columns]: ranks are neighbours in memory.
  __device__ __forceinline__ void fetch_across(const LoraColumn* columns, bool packs, std::int64_t feature,
                                               std::int64_t width) {
    const LoraColumn& column = columns[inner_of()];
    const float* from = column.matrix + (feature + outer_of(0)) * column.feature_step;
    const std::int64_t left = width - feature;
    const int count = left < kOuter ? static_cast<int>(left) : kOuter;
    packs ? fetch_rows_in<true>(from, column.feature_step, column.valid, count)
          : fetch_rows_in<false>(from, column.feature_step, column.valid, count);
  }
  /// [rows, columns] of u, one slab; what lies beyond a rank in its last quad is zero.
  __device__ __forceinline__ void fetch_rows(const LoraColumn* columns, std::int64_t row, int rows) {
    const LoraColumn& column = columns[inner_of()];
    fetch_rows_in<true>(column.u_row(row + outer_of(0)), column.u_stride, column.valid, rows);
  }
  __device__ __forceinline__ void put(unsigned char* tile) const {
    FLEXCORE_UNROLL
    for (int i = 0; i < kQuads; ++i) Layout::put(tile, kLow, outer_of(i), inner_of(), quads[i]);
  }

 private:
  template <bool packs>
  __device__ __forceinline__ void fetch_along_in(const LoraColumn* columns, std::int64_t feature, std::int64_t width) {
    const std::int64_t at = feature + inner_of(), left = width - at;
    const int most = left < 0 ? 0 : left < 4 ? static_cast<int>(left) : 4;
    FLEXCORE_UNROLL
    for (int i = 0; i < kQuads; ++i) {
      const LoraColumn& column = columns[outer_of(i)];
      quads[i] = load_quad<packs>(column.matrix + at, column.valid == 0 ? 0 : most);
    }
  }
  template <bool packs>
  __device__ __forceinline__ void fetch_rows_in(const float* from, std::int64_t stride, int valid, int count) {
    const std::int64_t step = stride * (kLoraThreads / (kInner / 4));
    FLEXCORE_UNROLL
    for (int i = 0; i < kQuads; ++i, from += step) quads[i] = load_quad<packs>(from, outer_of(i) < count ? valid : 0);
  }
};

/// A tile of activations: [128 rows, k], or, turned, [k rows, 128 features].
template <LoraMode mode, bool turned, int kDepth>
struct LoraRowsTile {
  static constexpr int kOuter = turned ? kDepth : kLoraM, kInner = turned ? kLoraM : kDepth;
  using Layout = LoraLayout<mode, kInner>;
  static constexpr int kLow = Layout::plane_bytes(kOuter);
  static constexpr int kBytes = kLow * (mode == LoraMode::kSplit ? 2 : 1);
  /// Copies of bfloat16 are asynchronous, two tiles ahead; floats pass through registers, one tile ahead.
  static constexpr bool kAsync = mode == LoraMode::kBf16;
  static constexpr int kBuffers = kAsync ? 3 : 2;
  static constexpr int kElements = kAsync ? 8 : 4;  // 16 bytes
  static constexpr int kPacks = kOuter * kInner / kElements / kLoraThreads;
  int kept;  // outer rows that the product looks at
  Pack<float, 4> quads[kAsync ? 1 : kPacks];

  static __device__ __forceinline__ int outer_of(int i) {
    return (static_cast<int>(threadIdx.x) + i * kLoraThreads) / (kInner / kElements);
  }
  static __device__ __forceinline__ int inner_of() {
    return static_cast<int>(threadIdx.x) % (kInner / kElements) * kElements;
  }

  /// Rows [row, row + rows) and columns from `column` on; zeros beyond both. `tile`: where it is wanted, free already.
  __device__ __forceinline__ void fetch(const Rows& x, bool packs, std::int64_t row, int rows, std::int64_t column,
                                        std::int64_t width, unsigned char* tile) {
    packs ? fetch_in<true>(x, row, rows, column, width, tile) : fetch_in<false>(x, row, rows, column, width, tile);
  }
  __device__ __forceinline__ void put(unsigned char* tile) const {
    if constexpr (!kAsync) {
      FLEXCORE_UNROLL
      for (int i = 0; i < kPacks; ++i)
        if (outer_of(i) < kept) Layout::put(tile, kLow, outer_of(i), inner_of(), quads[i]);
    }
  }

 private:
  using T = std::conditional_t<kAsync, bf16, float>;

  template <bool packs>
  __device__ __forceinline__ void fetch_in(const Rows& x, std::int64_t row, int rows, std::int64_t column,
                                           std::int64_t width, unsigned char* tile) {
    const std::int64_t at = column + inner_of(), left = width - at;
    const int valid = left < 0 ? 0 : left < kElements ? static_cast<int>(left) : kElements;
    const T* from = static_cast<const T*>(x.data) + (row + outer_of(0)) * x.stride + at;
    const std::int64_t step = x.stride * (kLoraThreads * kElements / kInner);
    FLEXCORE_UNROLL
    for (int i = 0; i < kPacks; ++i, from += step) {
      if (outer_of(i) >= kept) continue;
      const bool inside = outer_of(i) < rows && valid > 0;
      if constexpr (kAsync) {
        bf16* to = reinterpret_cast<bf16*>(tile) + outer_of(i) * Layout::kStride + inner_of();
        if constexpr (packs) {
          cp_async16(to, inside ? from : x.data, inside);
        } else {
          Pack<bf16, 8> pack;
          FLEXCORE_UNROLL
          for (int j = 0; j < 8; ++j) pack.at[j] = inside && j < valid ? from[j] : bf16{0};
          store_pack(to, pack);
        }
      } else {
        quads[i] = load_quad<packs>(from, inside ? valid : 0);
      }
    }
  }
};

/// C of one block, in registers. With few rows, warps that would have none take a part of k instead.
template <LoraMode mode, bool p_turned, bool q_turned, int kDepth>
struct LoraProduct {
  using P = LoraLayout<mode, p_turned ? kLoraM : kDepth>;
  using Q = typename LoraQTile<mode, q_turned, kDepth>::Layout;
  static constexpr int kQLow = LoraQTile<mode, q_turned, kDepth>::kLow;
  static constexpr bool kExact = mode == LoraMode::kExact;

  float c[8][4];  // exact: rows y + 16 i, columns x + 16 j. Else: m16 tile i / 4, n8 tile i % 4
  int p_low;      // bytes between the planes of P
  int groups;     // kExact: of 16 rows, else of 32 rows
  int row, column;
  int part, parts;  // of k
  int pairs;        // of n8 tiles in use

  __device__ __forceinline__ LoraProduct(int rows, int columns, int p_low) : p_low(p_low) {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize;
    if constexpr (kExact) {
      groups = (rows + 15) / 16;
      row = thread / 16;
      column = thread % 16;
    } else {
      groups = kept(rows) / 32;
      parts = 4 / groups;
      part = warp % 4 / groups;
      row = warp % groups * 32;
      column = warp / 4 * 32;
      const int left = columns - column;
      pairs = left <= 0 ? 0 : left <= 16 ? 1 : 2;
    }
    clear();
  }

  /// Rows of P that are looked at.
  static __device__ __forceinline__ int kept(int rows) { return rows <= 32 ? 32 : rows <= 64 ? 64 : kLoraM; }

  __device__ __forceinline__ void clear() {
    FLEXCORE_UNROLL
    for (int i = 0; i < 8; ++i) FLEXCORE_UNROLL
    for (int j = 0; j < 4; ++j) c[i][j] = 0.0f;
  }

  /// c += P Q^T over the first `depth` of the tiles' k.
  __device__ __forceinline__ void step(const unsigned char* p, const unsigned char* q, int depth) {
    if constexpr (kExact) {
      step_exact(reinterpret_cast<const float*>(p), reinterpret_cast<const float*>(q), depth);
    } else if (pairs > 0) {
      FLEXCORE_NO_UNROLL
      for (int k = 16 * part; k < depth; k += 16 * parts) step_mma(p, q, k);
    }
  }

  __device__ __forceinline__ void step_exact(const float* p, const float* q, int depth) {
    for (int k = 0; k < depth; ++k) {
      float a[4];
      FLEXCORE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int n = column + 16 * j;
        a[j] = q_turned ? q[k * Q::kStride + n] : q[n * Q::kStride + k];
      }
      FLEXCORE_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (i >= groups) continue;
        const int m = row + 16 * i;
        const float x = p_turned ? p[k * P::kStride + m] : p[m * P::kStride + k];
        FLEXCORE_UNROLL
        for (int j = 0; j < 4; ++j) c[i][j] = fmaf(x, a[j], c[i][j]);
      }
    }
  }

  __device__ __forceinline__ void step_mma(const unsigned char* p, const unsigned char* q, int k) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, i = lane / 8, r = lane % 8;
    FLEXCORE_UNROLL
    for (int t = 0; t < 2; ++t) {
      const int m = row + 16 * t;
      const int p_at = 2 * (p_turned ? (k + i / 2 * 8 + r) * P::kStride + m + i % 2 * 8
                                     : (m + i % 2 * 8 + r) * P::kStride + k + i / 2 * 8);
      unsigned a[4], a_low[4];
      load<p_turned>(a, p + p_at);
      if constexpr (mode == LoraMode::kSplit) load<p_turned>(a_low, p + p_low + p_at);
      FLEXCORE_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        if (pair >= pairs) continue;
        const int n = column + 16 * pair;
        const int q_at = 2 * (q_turned ? (k + i % 2 * 8 + r) * Q::kStride + n + i / 2 * 8
                                       : (n + i / 2 * 8 + r) * Q::kStride + k + i % 2 * 8);
        unsigned b[4], b_low[4];
        load<q_turned>(b, q + q_at);
        load<q_turned>(b_low, q + kQLow + q_at);
        FLEXCORE_UNROLL
        for (int half = 0; half < 2; ++half) {
          auto& sum = c[4 * t + 2 * pair + half];
          mma_bf16(sum, a, b_low[2 * half], b_low[2 * half + 1]);
          if constexpr (mode == LoraMode::kSplit) mma_bf16(sum, a_low, b[2 * half], b[2 * half + 1]);
          mma_bf16(sum, a, b[2 * half], b[2 * half + 1]);
        }
      }
    }
  }

  template <bool turned>
  static __device__ __forceinline__ void load(unsigned (&r)[4], const unsigned char* row) {
    if constexpr (turned)
      load_matrices_transposed(r, row);
    else
      load_matrices(r, row);
  }

  /// Leaves C [rows in use, kLoraCStride], parts of k in their order; ends with a barrier.
  __device__ __forceinline__ void to_shared(float* shared) {
    if constexpr (kExact) {
      FLEXCORE_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (i >= groups) continue;
        FLEXCORE_UNROLL
        for (int j = 0; j < 4; ++j) shared[(row + 16 * i) * kLoraCStride + column + 16 * j] = c[i][j];
      }
      __syncthreads();
    } else {
      for (int turn = 0; turn < parts; ++turn) {
        if (turn == part) add_to(shared, turn > 0);
        __syncthreads();
      }
    }
  }

  __device__ __forceinline__ void add_to(float* shared, bool add) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    FLEXCORE_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (i % 4 / 2 >= pairs) continue;
      FLEXCORE_UNROLL
      for (int half = 0; half < 2; ++half) {
        float* at =
            shared + (row + i / 4 * 16 + half * 8 + lane / 4) * kLoraCStride + column + i % 4 * 8 + lane % 4 * 2;
        Pack<float, 2> sum{{c[i][2 * half], c[i][2 * half + 1]}};
        if (add) {
          const auto before = load_pack<float, 2>(at);
          sum.at[0] += before.at[0], sum.at[1] += before.at[1];
        }
        store_pack(at, sum);
      }
    }
  }
};

/// The sum over `steps` tiles of k. fetch_p(tile, step, where) and fetch_q(tile, step) start the loads of one step; one
/// barrier a step. Q has two buffers: what step i reads is written again after the barrier of step i + 1.
template <LoraMode mode, bool p_turned, bool q_turned>
struct LoraPipeline {
  /// Of k at a time; floats on their way take registers.
  static constexpr int kDepth = mode == LoraMode::kBf16 ? kLoraK : kLoraK / 2;
  using P = LoraRowsTile<mode, p_turned, kDepth>;
  using Q = LoraQTile<mode, q_turned, kDepth>;
  using Product = LoraProduct<mode, p_turned, q_turned, kDepth>;
  static constexpr int kBytes = P::kBuffers * P::kBytes + 2 * Q::kBytes;
  static_assert(kBytes >= kLoraM * kLoraCStride * 4, "C takes the place of the tiles");

  template <class FetchP, class FetchQ>
  static __device__ __forceinline__ void run(Product& product, unsigned char* shared, int kept, int steps,
                                             FetchP&& fetch_p, FetchQ&& fetch_q) {
    unsigned char* const q_tiles = shared + P::kBuffers * P::kBytes;
    P p{kept};
    Q q;
    if constexpr (P::kAsync) {
      FLEXCORE_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (i < steps) fetch_p(p, i, shared + i * P::kBytes);
        cp_async_commit();
      }
    } else {
      fetch_p(p, 0, shared);
    }
    fetch_q(q, 0);
    for (int i = 0; i < steps; ++i) {
      unsigned char* const p_tile = shared + i % P::kBuffers * P::kBytes;
      unsigned char* const q_tile = q_tiles + i % 2 * Q::kBytes;
      q.put(q_tile);
      p.put(p_tile);
      if (i + 1 < steps) {
        fetch_q(q, i + 1);
        if constexpr (!P::kAsync) fetch_p(p, i + 1, p_tile);
      }
      if constexpr (P::kAsync) cp_async_wait<1>();
      __syncthreads();
      if constexpr (P::kAsync) {
        if (i + 2 < steps) fetch_p(p, i + 2, shared + (i + 2) % P::kBuffers * P::kBytes);
        cp_async_commit();
      }
      product.step(p_tile, q_tile, kDepth);
    }
    if constexpr (P::kAsync) cp_async_wait<0>();
    __syncthreads();  // C may take the place of the tiles
  }
};

}  // namespace flexcore::cuda
