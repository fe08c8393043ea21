#include <numeric>

#include "cases/array.h"
#include "cases/models.h"
#include "cases/op_case.h"
#include "ops/linear.h"

namespace flexcore::cases {

namespace {

/// Weights that read one x: q, k, v; gate, up; or one alone.
struct Group {
  const char* name;
  std::vector<std::int64_t> out_features;
  std::int64_t in_features;
  std::int64_t outputs() const { return std::accumulate(out_features.begin(), out_features.end(), std::int64_t{0}); }
  std::int64_t elements() const { return outputs() * in_features; }
};

std::vector<Group> groups_of(const ModelShape& m) {
  const std::int64_t heads = m.num_heads * m.head_dim, kv = m.num_kv_heads * m.head_dim;
  return {{"qkv", {heads, kv, kv}, m.hidden_size},
          {"o", {m.hidden_size}, heads},
          {"gate_up", {m.intermediate_size, m.intermediate_size}, m.hidden_size},
          {"down", {m.hidden_size}, m.intermediate_size},
          {"lm_head", {m.vocab_size}, m.hidden_size}};
}

struct Weights {
  Weights(OpContext& context, const Group& group, DType dtype) {
    for (std::size_t i = 0; i < group.out_features.size(); ++i)
      members.emplace_back(context, dtype, group.out_features[i], group.in_features, 100 + i);
  }
  std::vector<PackedNoise> members;
};

class Forward {
 public:
  Forward(OpContext& context, const Group& group, DType dtype, std::int64_t num_tokens)
      : dtype_(dtype), weights_(context, group, dtype), x_(dtype, {num_tokens, group.in_features}, Noise{1}) {
    for (const auto& weight : weights_.members) {
      y_.emplace_back(dtype, std::initializer_list{num_tokens, weight.view().out_features});
      members_.push_back({weight.view(), {}, y_.back().view()});
    }
  }
  void run(OpContext& context) { flexcore::run(context, LinearArgs{x_.view(), members_}); }
  Accuracy check() const {
    Accuracy accuracy{.allowed = 2 * epsilon(dtype_)};
    for (std::size_t m = 0; m < y_.size(); ++m) {
      const auto& weight = weights_.members[m];
      sample(x_.view().shape(0), 3, [&](std::int64_t i) {
        sample(weight.view().out_features, 29, [&](std::int64_t j) {
          double sum = 0;
          for (std::int64_t k = 0; k < weight.view().in_features; ++k) sum += x_.at(i, k) * weight.at(j, k);
          accuracy.see(y_[m].at(i, j), sum);
        });
      });
    }
    return accuracy;
  }

 private:
  DType dtype_;
  Weights weights_;
  Array x_;
  std::vector<Array> y_;
  std::vector<LinearArgs::Member> members_;
};

class Backward {
 public:
  Backward(OpContext& context, const Group& group, DType dtype, std::int64_t num_tokens)
      : weights_(context, group, dtype), grad_x_(DType::kFloat32, {num_tokens, group.in_features}) {
    for (std::size_t i = 0; i < weights_.members.size(); ++i) {
      const auto& weight = weights_.members[i].view();
      grad_y_.emplace_back(dtype, std::initializer_list{num_tokens, weight.out_features}, Noise{10 + i});
      members_.push_back({weight, grad_y_.back().view()});
    }
  }
  void run(OpContext& context) { flexcore::run(context, LinearBackwardArgs{members_, grad_x_.view()}); }
  Accuracy check() const {
    // Products are exact; only the sums round, and they are as long as the outputs are many.
    Accuracy accuracy{.allowed = 1e-4};
    sample(grad_x_.view().shape(0), 3, [&](std::int64_t i) {
      sample(grad_x_.view().shape(1), 29, [&](std::int64_t k) {
        double sum = 0;
        for (std::size_t m = 0; m < grad_y_.size(); ++m)
          for (std::int64_t j = 0; j < grad_y_[m].view().shape(1); ++j)
            sum += grad_y_[m].at(i, j) * weights_.members[m].at(j, k);
        accuracy.see(grad_x_.at(i, k), sum);
      });
    });
    return accuracy;
  }

 private:
  Weights weights_;
  std::vector<Array> grad_y_;
  Array grad_x_;
  std::vector<LinearBackwardArgs::Member> members_;
};

Rate rate_of(DType dtype) { return dtype == DType::kBFloat16 ? Rate::kBFloat16 : Rate::kFloat32; }

std::string shape_name(const Group& group, DType dtype, std::int64_t num_tokens) {
  return std::string(group.name) + "/" + std::string(dtype_name(dtype)) + "/tokens:" + std::to_string(num_tokens);
}

CaseSpec forward(const ModelShape& model, const Group& group, DType dtype, std::int64_t num_tokens) {
  const auto n = static_cast<double>(num_tokens), weights = static_cast<double>(group.elements());
  return {"linear",
          model.name,
          shape_name(group, dtype, num_tokens),
          {.read = size_of(dtype) * (weights + n * static_cast<double>(group.in_features)),
           .written = size_of(dtype) * n * static_cast<double>(group.outputs()),
           .flops = 2 * n * weights,
           .rate = rate_of(dtype)},
          maker<Forward>(group, dtype, num_tokens)};
}

CaseSpec backward(const ModelShape& model, const Group& group, DType dtype, std::int64_t num_tokens) {
  const auto n = static_cast<double>(num_tokens), weights = static_cast<double>(group.elements());
  return {"linear_backward",
          model.name,
          shape_name(group, dtype, num_tokens),
          {.read = size_of(dtype) * (weights + n * static_cast<double>(group.outputs())),
           .written = sizeof(float) * n * static_cast<double>(group.in_features),
           .flops = 2 * n * weights,
           .rate = rate_of(dtype)},
          maker<Backward>(group, dtype, num_tokens)};
}

}  // namespace

void add_linear_cases(std::vector<CaseSpec>& table) {
  constexpr auto kF32 = DType::kFloat32, kBF16 = DType::kBFloat16;
  const auto small = groups_of(kSmolLm2), large = groups_of(kLlama8b);
  for (const auto& group : small)
    for (const std::int64_t tokens : {1, 16, 128, 512})
      if (group.out_features[0] != kSmolLm2.vocab_size || tokens <= 16)
        table.push_back(forward(kSmolLm2, group, kBF16, tokens));
  for (const std::int64_t tokens : {1, 128}) table.push_back(forward(kSmolLm2, small[2], kF32, tokens));
  for (const auto& group : large)
    for (const std::int64_t tokens : {1, 16}) table.push_back(forward(kLlama8b, group, kBF16, tokens));
  table.push_back(forward(kLlama8b, large[0], kBF16, 128));

  for (const std::size_t i : {0, 2, 3})
    for (const std::int64_t tokens : {128, 512}) table.push_back(backward(kSmolLm2, small[i], kBF16, tokens));
  table.push_back(backward(kSmolLm2, small[2], kF32, 128));
  table.push_back(backward(kLlama8b, large[0], kBF16, 128));
}

}  // namespace flexcore::cases
