#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "flexcore/error.h"
#include "flexcore/tensor.h"

/// The engine's kernels on arrays that the caller owns, in the memory of the runtime's device. Nothing is copied;
/// outputs are the caller's too. Arrays that say how others are laid out are in the host's memory: scaling, indptr,
/// adapter_ids, block_tables, and the positions of sequences.
///
/// Shapes stand beside the arguments. "float" is float32 or bfloat16, each array its own, unless told otherwise;
/// sums are float32 everywhere. The elements of a row lie side by side; rows may have gaps except where "contiguous" is
/// written. A default TensorView means "not given". No rows is legal and does nothing. Outputs may not overlap
/// other arguments except where told so.
///
/// Every function throws InvalidArgument that names the argument, what came and what was wanted; outputs are undefined
/// then. Results do not depend on the number of threads, and a row's result does not depend on the other rows.
namespace flexcore::ops {

/// A device with threads and scratch memory for calls. One thread at a time may use it.
///
/// On a GPU, calls go to a stream of the runtime's own and may return before they are done; the GPU must be the calling
/// thread's current one, and what others write must be complete. `synchronously` sees to all of that.
class Runtime {
 public:
  /// num_threads 0: every core this process may use. Throws DeviceError when there is no such device.
  explicit Runtime(int num_threads = 0, Device device = {});
  ~Runtime();
  Runtime(Runtime&&) noexcept;
  Runtime& operator=(Runtime&&) noexcept;
  int num_threads() const;
  Device device() const;
  /// Waits for everything that was given to the device before, then calls body() with the device as the thread's own,
  /// and waits for its results.
  void synchronously(const std::function<void()>& body);
  /// Copies bytes of the device's memory to the host, after the calls before.
  void download(void* host, const void* device, std::size_t bytes);
  struct Impl;
  Impl& impl() { return *impl_; }

 private:
  std::unique_ptr<Impl> impl_;
};

/// y = x W^T + bias, in the weight's dtype with float32 sums.
void linear(Runtime& runtime, const TensorView& x,  // [num_tokens, in_features] float
            const TensorView& weight,               // [out_features, in_features] float, contiguous
            const TensorView& bias,                 // [out_features] float32, contiguous, or not given
            const TensorView& y);                   // [num_tokens, out_features] float

/// grad_x = grad_y W. The weight is frozen: it gets no gradient.
void linear_backward(Runtime& runtime, const TensorView& grad_y,  // [num_tokens, out_features] float
                     const TensorView& weight,                    // [out_features, in_features] float, contiguous
                     const TensorView& grad_x);                   // [num_tokens, in_features] float32

/// A linear layer and the LoRA adapters of a ragged batch (segments, as in Punica's SGMV, arXiv 2310.18547).
struct LoraLayer {
  TensorView x;       // [num_tokens, in_features] float
  TensorView weight;  // [out_features, in_features] float, contiguous; not given: the bypass alone
  TensorView lora_a;  // [rank, in_features], or [num_adapters, rank, in_features]; float32, contiguous; rank 1..256
  TensorView lora_b;  // [out_features, rank], or [num_adapters, out_features, rank]; float32, contiguous
  std::span<const float> scaling;  // [num_adapters], or one for all of them: alpha / rank
  /// [num_segments + 1] int32 of the host, from 0 to num_tokens; not given: one segment. Segment i is rows
  /// [indptr[i], indptr[i+1]).
  TensorView indptr;
  TensorView adapter_ids;  // [num_segments] int32 of the host, -1: no adapter; not given: segment i has adapter i
};

/// y = x W^T + scaling * (x A^T) B^T, each row with its segment's adapter (Hu et al., arXiv 2106.09685). The rank-r
/// intermediate is float32.
void lora_forward(Runtime& runtime, const LoraLayer& layer, const TensorView& y);  // [num_tokens, out_features] float

/// With u = x A^T and du = grad_y B: grad_x = grad_y W + scaling * du A, grad_a += scaling * du^T x,
/// grad_b += scaling * grad_y^T u, so that windows of one sequence add up (FlexLLM, arXiv 2402.18789, section 6.1).
void lora_backward(Runtime& runtime, const LoraLayer& layer,
                   const TensorView& grad_y,   // [num_tokens, out_features] float
                   const TensorView& grad_x,   // [num_tokens, in_features] float32, contiguous
                   const TensorView& grad_a,   // like lora_a, float32, contiguous
                   const TensorView& grad_b);  // like lora_b, float32, contiguous

/// y = x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich, arXiv 1910.07467).
void rms_norm(Runtime& runtime, const TensorView& x,  // [rows, width] float
              const TensorView& weight,               // [width] float32, contiguous
              const TensorView& y,                    // [rows, width] float; may be x
              float eps);
void rms_norm_backward(Runtime& runtime, const TensorView& grad_y,  // [rows, width] float
                       const TensorView& x,                         // [rows, width] float
                       const TensorView& weight,                    // [width] float32, contiguous
                       const TensorView& grad_x,                    // [rows, width] float; may be grad_y
                       float eps);

/// Rotary position embedding over the pairs (i, i + head_dim / 2) (Su et al., arXiv 2104.09864, in the layout of
/// Llama's Hugging Face weights). `inverse` turns back, which is also the gradient.
void rotary(Runtime& runtime, const TensorView& x,  // [num_tokens, num_heads, head_dim] float
            const TensorView& positions,            // [num_tokens] int32 in [0, max_positions), contiguous
            const TensorView& cos,                  // [max_positions, head_dim / 2] float32, contiguous
            const TensorView& sin,                  // like cos
            const TensorView& y,                    // like x in shape, float; may be x
            bool inverse);

/// y = silu(gate) * up (SwiGLU; Shazeer, arXiv 2002.05202). All are [num_tokens, intermediate_size] float; gate and up
/// have one dtype.
void silu_mul(Runtime& runtime, const TensorView& gate, const TensorView& up, const TensorView& y);
void silu_mul_backward(Runtime& runtime, const TensorView& grad_y, const TensorView& gate, const TensorView& up,
                       const TensorView& grad_gate,  // float, or not given: not wanted
                       const TensorView& grad_up);   // likewise

/// Cross-entropy of hidden W^T against the labels, without the logits in memory: the vocabulary goes by in chunks, the
/// softmax is kept online. grad_hidden = grad_scale * (softmax - onehot(label)) W in the same pass.
void linear_cross_entropy(Runtime& runtime, const TensorView& hidden,  // [rows, hidden_size] float
                          const TensorView& weight,                    // [vocab_size, hidden_size] float, contiguous
                          const TensorView& labels,                    // [rows] int32 in [0, vocab_size), contiguous
                          const TensorView& grad_scale,    // [rows] float32, contiguous; given with grad_hidden
                          const TensorView& loss,          // [rows] float32, contiguous
                          const TensorView& grad_hidden);  // [rows, hidden_size] float, or not given: not wanted

/// Keys and values of several sequences in pages of block_size tokens (PagedAttention; Kwon et al., arXiv 2309.06180).
/// Row i of the batch's tokens [indptr[s], indptr[s+1]) is token positions[s] + i - indptr[s] of sequence s.
struct PagedKv {
  TensorView k_pages;       // [num_blocks, num_kv_heads, block_size, head_dim] float, contiguous; keys are rotated
  TensorView v_pages;       // like k_pages, dtype too. head_dim: a multiple of 8 up to 256
  TensorView block_tables;  // [num_seqs, max_blocks] int32: page of each block of the sequence; unused entries are free
  TensorView indptr;        // [num_seqs + 1] int32, from 0 to num_tokens
  TensorView positions;     // [num_seqs] int32: position of the sequence's first row; all three in the host's memory
};

/// Stores the batch's keys and values in their pages.
void kv_write(Runtime& runtime, const TensorView& k,  // [num_tokens, num_kv_heads, head_dim] float, rotated
              const TensorView& v,                    // like k in shape
              const PagedKv& kv);

/// Causal grouped-query attention of each row over its sequence's pages, its own token included. With a sliding window,
/// the row at position p sees positions above p - sliding_window.
void attention(Runtime& runtime, const TensorView& q,  // [num_tokens, num_heads, head_dim] float, rotated
               const PagedKv& kv,
               const TensorView& y,         // like q in shape, float
               const TensorView& lse,       // [num_tokens, num_heads] float32: log-sum-exp of the scaled scores
               float scale,                 // of the scores: 1 / sqrt(head_dim) as a rule
               std::int64_t sliding_window  // 0: none
);

/// One window of a sequence's attention in backward: rows are positions [position, position + num_tokens).
struct AttentionWindow {
  TensorView grad_y;       // [num_tokens, num_heads, head_dim] float
  TensorView q;            // like grad_y in shape, float, rotated
  TensorView y;            // forward's output
  TensorView lse;          // [num_tokens, num_heads] float32, forward's
  TensorView k_pages;      // as in PagedKv
  TensorView v_pages;      // as in PagedKv
  TensorView block_table;  // [max_blocks] int32 of the host, contiguous
  std::int64_t position = 0;
  float scale = 1.0f;
  std::int64_t sliding_window = 0;
};

/// Token-level backward (FlexLLM, arXiv 2402.18789, section 6.1): windows of a sequence come right to left, cut as one
/// likes. Adds to grad_k and grad_v of positions [0, position + num_tokens); the window's own rows are final then, and
/// are copied out.
void attention_backward_window(
    Runtime& runtime, const AttentionWindow& window,
    const TensorView& grad_k,        // [>= position + num_tokens, num_kv_heads, head_dim] float32, contiguous, +=
    const TensorView& grad_v,        // like grad_k, +=
    const TensorView& grad_q,        // like q in shape, float
    const TensorView& grad_k_rows,   // [num_tokens, num_kv_heads, head_dim] float; still rotated
    const TensorView& grad_v_rows);  // like grad_k_rows

struct AdamW {
  std::int64_t step = 1;  // this step's number, from 1
  double learning_rate = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.0;
  double grad_scale = 1.0;  // multiplies the gradient first: clipping
};

/// One step of AdamW with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), in place. All are float32
/// of one shape, contiguous.
void adamw(Runtime& runtime, const TensorView& param, const TensorView& grad, const TensorView& exp_avg,
           const TensorView& exp_avg_sq, const AdamW& options);

struct Sampling {
  float temperature = 1.0f;  // 0: greedy, the lowest id among equals
  std::int32_t top_k = 0;    // 0 or -1: all
  float top_p = 1.0f;
  float min_p = 0.0f;
  std::uint64_t seed = 0, counter = 0;  // row i's draw depends on (seed, counter + i) and its logits alone
};

/// Throws Error when a row has NaN or +infinity, or no token to choose.
void sample(Runtime& runtime, const TensorView& logits,  // [rows, vocab_size] float32
            const Sampling& options,
            const TensorView& tokens,     // [rows] int32, contiguous
            const TensorView& logprobs);  // [rows] float32, contiguous: log-softmax of the raw logits

}  // namespace flexcore::ops
