#pragma once

#include "backends/cpu/kernels/attention.h"

namespace flexcore::cpu::FLEXCORE_ISA {

// The entries of AttentionKernels, by the names there.
std::int64_t attention_forward_scratch(const AttentionProblem& p, std::int64_t rows);
void attention_forward(const AttentionProblem& p, const AttentionTile& t, float* scratch);
void attention_forward_split(const AttentionProblem& p, const AttentionTile& t, std::int64_t split, float* partial,
                             float* scratch);
void attention_forward_merge(const AttentionProblem& p, const AttentionTile& t, std::int64_t num_splits,
                             const float* partials, float* scratch);

std::int64_t attention_backward_scratch(const AttentionProblem& p);
void attention_backward(const AttentionProblem& p, const AttentionGradients& g, const AttentionBackwardPiece& piece,
                        float* scratch);
void attention_backward_reduce(const AttentionProblem& p, const AttentionGradients& g,
                               const AttentionBackwardPiece* pieces, std::int64_t num_pieces, std::int64_t begin,
                               std::int64_t end);

}  // namespace flexcore::cpu::FLEXCORE_ISA
