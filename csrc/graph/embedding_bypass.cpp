#include "graph/embedding_bypass.h"

#include "ops/linear.h"
#include "ops/product.h"
#include "ops/rows.h"
#include "ops/table.h"

namespace flexcore {

namespace {

const SiteSegments& segments_of(const BatchState& batch, SiteId site) {
  return batch.sites[static_cast<std::size_t>(site)];
}

/// A, or its gradient: [rank, vocab_size].
TokenTable table_of_a(float* a, const LoraSegment& segment, std::int64_t vocab_size) {
  return {a, vocab_size, segment.rank, 1, vocab_size};
}
TensorView matrix_b(float* b, const LoraSegment& segment, std::int64_t width) {
  return TensorView(b, DType::kFloat32, {width, segment.rank});
}

/// What goes into B: a token's column of A.
TensorView look_up_a(OpContext& context, const TensorView& tokens, const LoraSegment& segment,
                     std::int64_t vocab_size) {
  const TensorView z = context.scratch->tensor(DType::kFloat32, {tokens.shape(0), segment.rank});
  run(context, TableLookUpArgs{tokens, table_of_a(const_cast<float*>(segment.lora_a), segment, vocab_size), z});
  return z;
}

class EmbeddingBypassOp final : public Operator {
 public:
  explicit EmbeddingBypassOp(SiteId site) : site_(site) {}
  std::string_view name() const override { return "embedding_bypass"; }
  int alias(int) const override { return 0; }
  bool trainable() const override { return true; }
  bool idle(const BatchState& batch) const override { return segments_of(batch, site_).empty(); }
  void run(const RunState& state, const Node&, std::span<const TensorView>,
           std::span<const TensorView> out) const override {
    OpContext& context = *state.context;
    const SiteSegments& segments = segments_of(*state.batch, site_);
    for (const auto& s : segments.own)
      if (s.begin < s.end)
        flexcore::run(
            context, EmbeddingArgs{state.batch->token_ids.rows(s.begin, s.end), s.weight, out[0].rows(s.begin, s.end)});
    for (const auto& s : segments.lora) {
      if (s.begin == s.end) continue;
      const Arena::Scope scope(*context.scratch);
      const TensorView y = out[0].rows(s.begin, s.end);
      const TensorView z = look_up_a(context, state.batch->token_ids.rows(s.begin, s.end), s, segments.num_tokens);
      flexcore::run(context, ProductArgs{.a = z,
                                         .b = matrix_b(const_cast<float*>(s.lora_b), s, y.shape(1)),
                                         .c = y,
                                         .alpha = s.scaling,
                                         .transpose_b = true,
                                         .mode = GradMode::kAccumulate});
    }
  }

 private:
  SiteId site_;
};

class OwnOutputOp final : public Operator {
 public:
  explicit OwnOutputOp(SiteId site) : site_(site) {}
  std::string_view name() const override { return "own_output"; }
  int alias(int) const override { return 0; }
  bool idle(const BatchState& batch) const override { return segments_of(batch, site_).own.empty(); }
  void run(const RunState& state, const Node&, std::span<const TensorView> in,
           std::span<const TensorView> out) const override {
    for (const auto& s : segments_of(*state.batch, site_).own) {
      if (s.begin == s.end) continue;
      const LinearArgs::Member member{s.weight, {}, out[0].rows(s.begin, s.end)};
      flexcore::run(*state.context, LinearArgs{in[1].rows(s.begin, s.end), {&member, 1}});
    }
  }

 private:
  SiteId site_;
};

}  // namespace

// With z = A[:, token]^T: grad_b += scaling * grad_x^T z, and grad_z = scaling * grad_x B goes to the tokens' columns
// of grad_a.
void add_embedding_gradients(OpContext& context, const BatchState& batch, SiteId site, const TensorView& grad_x) {
  const SiteSegments& segments = segments_of(batch, site);
  const std::int64_t width = grad_x.shape(1);
  for (const auto& s : segments.own)
    if (s.begin < s.end && s.grad_weight != nullptr)
      run(context, TableAddArgs{batch.token_ids.rows(s.begin, s.end), grad_x.rows(s.begin, s.end),
                                TokenTable{s.grad_weight, segments.num_tokens, width, width, 1}});
  for (const auto& s : segments.lora) {
    if (s.begin == s.end || s.grad_a == nullptr) continue;
    const Arena::Scope scope(*context.scratch);
    const TensorView tokens = batch.token_ids.rows(s.begin, s.end), grad = grad_x.rows(s.begin, s.end);
    const TensorView z = look_up_a(context, tokens, s, segments.num_tokens);
    run(context, ProductArgs{.a = grad,
                             .b = z,
                             .c = matrix_b(s.grad_b, s, width),
                             .alpha = s.scaling,
                             .transpose_a = true,
                             .mode = GradMode::kAccumulate});
    run(context,
        ProductArgs{.a = grad, .b = matrix_b(const_cast<float*>(s.lora_b), s, width), .c = z, .alpha = s.scaling});
    run(context, TableAddArgs{tokens, z, table_of_a(s.grad_a, s, segments.num_tokens)});
  }
}

std::shared_ptr<const Operator> embedding_bypass_op(SiteId site) { return std::make_shared<EmbeddingBypassOp>(site); }
std::shared_ptr<const Operator> own_output_op(SiteId site) { return std::make_shared<OwnOutputOp>(site); }

}  // namespace flexcore
