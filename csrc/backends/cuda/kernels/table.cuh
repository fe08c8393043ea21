#pragma once

#include "backends/cuda/kernels/device.cuh"

// Tables of numbers by token (ops/table.h): whole embeddings and the A of a LoRA at one. Bound by memory, and small: a
// row of the batch reads or adds to one of the table's.

namespace flexcore::cuda {

inline constexpr int kTableThreads = 128;

struct TableRows {
  const std::int32_t* token_ids;  // [rows]
  int rows;
  float* x;  // [rows, width]
  std::int64_t x_stride;
  float* table;
  std::int64_t num_tokens, width, token_stride, column_stride;
};

/// x[i] = table[token_ids[i]], NaN for what is no token. Grid: (rows, columns / threads).
__global__ void __launch_bounds__(kTableThreads) table_look_up_kernel(const TableRows t) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kTableThreads + threadIdx.x, row = blockIdx.x;
  if (column >= t.width) return;
  const std::int32_t token = t.token_ids[row];
  t.x[row * t.x_stride + column] = token >= 0 && token < t.num_tokens
                                       ? t.table[token * t.token_stride + column * t.column_stride]
                                       : __int_as_float(0x7fc00000);
}

/// table[token_ids[i]] += x[i]. The first row of a token adds all of them, in their order; what is no token adds
/// nothing. Grid: (rows, columns / threads).
__global__ void __launch_bounds__(kTableThreads) table_add_kernel(const TableRows t) {
  const int row = static_cast<int>(blockIdx.x);
  const std::int32_t token = t.token_ids[row];
  if (token < 0 || token >= t.num_tokens) return;
  for (int i = 0; i < row; ++i)
    if (t.token_ids[i] == token) return;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kTableThreads + threadIdx.x;
  if (column >= t.width) return;
  float* at = t.table + token * t.token_stride + column * t.column_stride;
  float sum = *at;
  for (int i = row; i < t.rows; ++i)
    if (t.token_ids[i] == token) sum += t.x[i * t.x_stride + column];
  *at = sum;
}

}  // namespace flexcore::cuda
