#include "cases/array.h"
#include "cases/models.h"
#include "cases/op_case.h"
#include "ops/lora.h"

namespace flexcore::cases {

namespace {

constexpr float kScaling = 2.0f;

struct Shape {
  std::vector<std::int64_t> out_features;  // of the modules that read one x
  std::int64_t in_features, num_tokens, num_adapters;
  std::int64_t rank = kRank;
};

/// LoRA matrices of every module and adapter; adapter s has rows [s n / adapters, (s + 1) n / adapters).
struct Adapters {
  explicit Adapters(const Shape& shape, bool gradients) : shape(shape) {
    for (std::size_t m = 0; m < shape.out_features.size(); ++m) {
      auto& segments = members.emplace_back();
      for (std::int64_t s = 0; s < shape.num_adapters; ++s) {
        const auto [begin, end] =
            std::pair(s * shape.num_tokens / shape.num_adapters, (s + 1) * shape.num_tokens / shape.num_adapters);
        const float* a = add({shape.rank, shape.in_features}, noise_a(m, s));
        const float* b = add({shape.out_features[m], shape.rank}, noise_b(m, s));
        LoraSegment segment{begin, end, a, b, shape.rank, kScaling};
        if (gradients) {
          segment.grad_a = add({shape.rank, shape.in_features}, Noise{0, 0});
          segment.grad_b = add({shape.out_features[m], shape.rank}, Noise{0, 0});
        }
        segments.push_back(segment);
      }
    }
  }
  Noise noise_a(std::size_t module, std::int64_t adapter) const {
    return {1000 + 64 * module + static_cast<std::uint64_t>(adapter),
            1 / std::sqrt(static_cast<float>(shape.in_features))};
  }
  Noise noise_b(std::size_t module, std::int64_t adapter) const {
    return {5000 + 64 * module + static_cast<std::uint64_t>(adapter), 1 / std::sqrt(static_cast<float>(shape.rank))};
  }

  Shape shape;
  std::vector<std::vector<LoraSegment>> members;

 private:
  float* add(std::initializer_list<std::int64_t> extents, Noise noise) {
    return arrays_.emplace_back(DType::kFloat32, extents, noise).floats();
  }
  std::vector<Array> arrays_;
};

/// (x A^T)[r] of one row.
double shrunk(const Array& x, const LoraSegment& segment, std::int64_t row, std::int64_t r) {
  double sum = 0;
  for (std::int64_t k = 0; k < x.view().shape(1); ++k) sum += x.at(row, k) * segment.lora_a[r * x.view().shape(1) + k];
  return sum;
}

/// (grad_y B)[r] of one row.
double shrunk_gradient(const Array& grad_y, const LoraSegment& segment, std::int64_t row, std::int64_t r) {
  double sum = 0;
  for (std::int64_t j = 0; j < grad_y.view().shape(1); ++j)
    sum += grad_y.at(row, j) * segment.lora_b[j * segment.rank + r];
  return sum;
}

class Forward {
 public:
  Forward(OpContext&, const Shape& shape)
      : adapters_(shape, false), x_(DType::kBFloat16, {shape.num_tokens, shape.in_features}, Noise{1}) {
    for (std::size_t m = 0; m < shape.out_features.size(); ++m) {
      y_.emplace_back(DType::kBFloat16, std::initializer_list{shape.num_tokens, shape.out_features[m]}, 0.0f);
      members_.push_back({y_.back().view(), adapters_.members[m]});
    }
  }
  void run(OpContext& context) { flexcore::run(context, LoraArgs{x_.view(), members_}); }
  Accuracy check() const {
    Accuracy accuracy{.allowed = epsilon(DType::kBFloat16)};
    for (std::size_t m = 0; m < y_.size(); ++m)
      for (const auto& segment : adapters_.members[m])
        sample(y_[m].view().shape(1), 7, [&](std::int64_t j) {
          double sum = 0;
          for (std::int64_t r = 0; r < segment.rank; ++r)
            sum += shrunk(x_, segment, segment.begin, r) * segment.lora_b[j * segment.rank + r];
          accuracy.see(y_[m].at(segment.begin, j), kScaling * sum);
        });
    return accuracy;
  }

 private:
  Adapters adapters_;
  Array x_;
  std::vector<Array> y_;
  std::vector<LoraArgs::Member> members_;
};

class Backward {
 public:
  Backward(OpContext&, const Shape& shape)
      : adapters_(shape, true),
        x_(DType::kBFloat16, {shape.num_tokens, shape.in_features}, Noise{1}),
        grad_x_(DType::kFloat32, {shape.num_tokens, shape.in_features}, 0.0f) {
    for (std::size_t m = 0; m < shape.out_features.size(); ++m) {
      grad_y_.emplace_back(DType::kBFloat16, std::initializer_list{shape.num_tokens, shape.out_features[m]},
                           Noise{20 + m});
      members_.push_back({grad_y_.back().view(), adapters_.members[m]});
    }
  }
  void run(OpContext& context) { flexcore::run(context, LoraBackwardArgs{x_.view(), members_, grad_x_.view()}); }
  Accuracy check() const {
    Accuracy accuracy{.allowed = 1e-3};
    const std::int64_t in = x_.view().shape(1);
    const auto& first = adapters_.members[0].front();
    sample(in, 7, [&](std::int64_t k) {
      double grad_x = 0, grad_a = 0;
      for (std::size_t m = 0; m < grad_y_.size(); ++m) {
        const auto& segment = adapters_.members[m].front();
        for (std::int64_t r = 0; r < segment.rank; ++r)
          grad_x += shrunk_gradient(grad_y_[m], segment, 0, r) * segment.lora_a[r * in + k];
      }
      for (std::int64_t i = first.begin; i < first.end; ++i)
        grad_a += shrunk_gradient(grad_y_[0], first, i, 1) * x_.at(i, k);
      accuracy.see(grad_x_.at(0, k), kScaling * grad_x);
      accuracy.see(first.grad_a[in + k], kScaling * grad_a);
    });
    sample(grad_y_[0].view().shape(1), 7, [&](std::int64_t j) {
      double grad_b = 0;
      for (std::int64_t i = first.begin; i < first.end; ++i) grad_b += grad_y_[0].at(i, j) * shrunk(x_, first, i, 1);
      accuracy.see(first.grad_b[j * first.rank + 1], kScaling * grad_b);
    });
    return accuracy;
  }

 private:
  Adapters adapters_;
  Array x_, grad_x_;
  std::vector<Array> grad_y_;
  std::vector<LoraBackwardArgs::Member> members_;
};

void add(std::vector<CaseSpec>& table, const ModelShape& model, const char* group, const Shape& shape, bool backward) {
  const auto n = static_cast<double>(shape.num_tokens), in = static_cast<double>(shape.in_features);
  double out = 0, matrices = 0;
  for (const auto features : shape.out_features) {
    out += static_cast<double>(features);
    matrices += static_cast<double>(shape.rank) * (in + static_cast<double>(features));
  }
  const double adapter_bytes = sizeof(float) * matrices * static_cast<double>(shape.num_adapters);
  const std::string name = std::string(group) + "/rank:" + std::to_string(shape.rank) +
                           "/tokens:" + std::to_string(shape.num_tokens) +
                           "/adapters:" + std::to_string(shape.num_adapters);
  // bfloat16 rows and float32 matrices; y and the gradients are added to.
  if (backward)
    table.push_back({"lora_backward",
                     model.name,
                     name,
                     {.read = 2 * adapter_bytes + n * (2 * in + 2 * out + 4 * in),
                      .written = adapter_bytes + n * 4 * in,
                      .flops = 6 * n * matrices},
                     maker<Backward>(shape)});
  else
    table.push_back(
        {"lora_forward",
         model.name,
         name,
         {.read = adapter_bytes + n * (2 * in + 2 * out), .written = n * 2 * out, .flops = 2 * n * matrices},
         maker<Forward>(shape)});
}

}  // namespace

void add_lora_cases(std::vector<CaseSpec>& table) {
  for (const auto* model : {&kSmolLm2, &kLlama8b}) {
    const std::int64_t kv = model->num_kv_heads * model->head_dim, hidden = model->hidden_size;
    const std::vector<std::int64_t> qkv = {model->num_heads * model->head_dim, kv, kv};
    const std::vector<std::int64_t> gate_up = {model->intermediate_size, model->intermediate_size};
    const bool small = model == &kSmolLm2;
    add(table, *model, "qkv", {qkv, hidden, 1, 1}, false);
    add(table, *model, "qkv", {qkv, hidden, 16, 16}, false);
    add(table, *model, "qkv", {qkv, hidden, small ? 512 : 128, 1}, false);
    if (small) add(table, *model, "gate_up", {gate_up, hidden, 512, 1}, false);
    add(table, *model, "qkv", {qkv, hidden, small ? 512 : 128, 1}, true);
    if (small) add(table, *model, "gate_up", {gate_up, hidden, 512, 1}, true);
    if (small) add(table, *model, "down", {{hidden}, model->intermediate_size, 512, 1}, true);
  }
}

}  // namespace flexcore::cases
