#pragma once

#include <cstdint>

#include "backends/cpu/isa.h"

namespace flexcore::cpu {

/// Keys of one panel, aligned to position 0. Panels and splits depend on a key's position alone, which fixes the order
/// of every sum over keys.
inline constexpr int kKeyBlock = 64;
/// Keys that share one online softmax; the results of splits are merged in ascending order, whoever computed them.
inline constexpr int kKeySplit = 256;

/// [num_tokens, heads, head_dim] float32 or bfloat16, last dimension dense; strides in elements.
struct HeadRows {
  void* data = nullptr;
  std::int64_t token_stride = 0, head_stride = 0;
  bool bf16 = false;
};

/// What all pieces of one call share.
struct AttentionProblem {
  HeadRows q;
  const void* keys = nullptr;    // [num_blocks, num_kv_heads, block_size, head_dim], pages `page_stride` apart
  const void* values = nullptr;  // like keys
  bool bf16_pages = false;
  std::int64_t group = 1;  // query heads of one kv head
  std::int64_t num_kv_heads = 0, head_dim = 0, block_size = 0, page_stride = 0;
  std::int64_t sliding_window = 0;  // 0: none
  float scale = 1.0f;
  HeadRows y;
  float* lse = nullptr;  // forward: may be null
  std::int64_t lse_stride = 0;
};

/// Consecutive tokens of one sequence, for one kv head. Its `rows` are (token, query head of the group), token-major.
struct AttentionTile {
  std::int64_t token = 0, num_tokens = 0;  // in the batch
  std::int64_t position = 0;               // of the first token
  std::int64_t kv_head = 0;
  const std::int32_t* block_table = nullptr;
};

/// Backward's further operands.
struct AttentionGradients {
  HeadRows grad_y, grad_q, grad_k_rows, grad_v_rows;
};

/// One kv head of one window, against keys [key_begin, key_end).
struct AttentionBackwardPiece {
  AttentionTile tile;  // the whole window
  std::int64_t key_begin = 0, key_end = 0;
  float* grad_k = nullptr;  // [sequence_length, num_kv_heads, head_dim]
  float* grad_v = nullptr;  // likewise
  float* grad_q =
      nullptr;  // [num_tokens * group, padded head_dim] of this piece; rows that see no key of it stay unwritten
};

struct AttentionKernels {
  /// head_dim rounded up to whole vectors: the row length of float32 scratch.
  std::int64_t (*padded_dim)(std::int64_t head_dim);

  /// Stores rows of k and v in their pages; kv_head is not used.
  void (*write_pages)(const HeadRows& k, const HeadRows& v, const AttentionProblem&, const AttentionTile&);

  std::int64_t (*forward_scratch)(const AttentionProblem&, std::int64_t num_rows);  // floats
  /// All keys of a tile: writes y and lse.
  void (*forward)(const AttentionProblem&, const AttentionTile&, float* scratch);
  /// One split of a tile's keys. partial: [num_rows, padded head_dim], then maximum and sum, [num_rows] each.
  void (*forward_split)(const AttentionProblem&, const AttentionTile&, std::int64_t split, float* partial,
                        float* scratch);
  /// Merges the partial results of splits [begin, end), laid out one after the other, and writes y and lse.
  void (*forward_merge)(const AttentionProblem&, const AttentionTile&, std::int64_t num_splits, const float* partials,
                        float* scratch);

  std::int64_t (*backward_scratch)(const AttentionProblem&);  // floats
  /// Adds to grad_k and grad_v, copies final rows out, and writes the piece's part of grad_q.
  void (*backward)(const AttentionProblem&, const AttentionGradients&, const AttentionBackwardPiece&, float* scratch);
  /// grad_q of tokens [begin, end) of a window = scale * sum over the pieces that the row sees.
  void (*backward_reduce)(const AttentionProblem&, const AttentionGradients&, const AttentionBackwardPiece* pieces,
                          std::int64_t num_pieces, std::int64_t begin, std::int64_t end);
};

FLEXCORE_KERNEL_TABLE(AttentionKernels, attention_kernels)

}  // namespace flexcore::cpu
