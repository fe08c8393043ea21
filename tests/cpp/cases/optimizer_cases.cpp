#include "cases/array.h"
#include "cases/models.h"
#include "cases/op_case.h"
#include "ops/optimizer.h"

namespace flexcore::cases {

namespace {

constexpr double kRate = 1e-3, kDecay = 0.1;

/// Sizes of the matrices A and B of an adapter on every linear of the model.
std::vector<std::int64_t> adapter_sizes(const ModelShape& m) {
  const std::int64_t heads = m.num_heads * m.head_dim, kv = m.num_kv_heads * m.head_dim;
  const std::pair<std::int64_t, std::int64_t> modules[] = {{heads, m.hidden_size},
                                                           {kv, m.hidden_size},
                                                           {kv, m.hidden_size},
                                                           {m.hidden_size, heads},
                                                           {m.intermediate_size, m.hidden_size},
                                                           {m.intermediate_size, m.hidden_size},
                                                           {m.hidden_size, m.intermediate_size}};
  std::vector<std::int64_t> sizes;
  for (std::int64_t layer = 0; layer < m.num_layers; ++layer)
    for (const auto& [out, in] : modules) sizes.insert(sizes.end(), {kRank * in, out * kRank});
  return sizes;
}

class AdamW {
 public:
  AdamW(OpContext&, const ModelShape& model) {
    for (const auto size : adapter_sizes(model)) {
      const auto add = [&](Noise noise) {
        return arrays_.emplace_back(DType::kFloat32, std::initializer_list{size}, noise).floats();
      };
      tensors_.push_back({add({1}), add({2}), add({0, 0}), add({0, 0}), size});
    }
  }
  void run(OpContext& context) {
    flexcore::run(context,
                  AdamWArgs{.tensors = tensors_, .step = ++step_, .learning_rate = kRate, .weight_decay = kDecay});
  }
  /// After one step from zero moments, each parameter moved by the rate along its gradient's sign.
  Accuracy check() const {
    Accuracy accuracy{.allowed = 1e-5};
    for (const auto& tensor : tensors_)
      sample(tensor.size, 3, [&](std::int64_t i) {
        const double grad = Noise{2}(i), before = Noise{1}(i);
        accuracy.see(tensor.param[i], before * (1 - kRate * kDecay) - kRate * grad / (std::abs(grad) + 1e-8));
      });
    return accuracy;
  }

 private:
  std::vector<Array> arrays_;
  std::vector<AdamWArgs::Tensor> tensors_;
  std::int64_t step_ = 0;
};

}  // namespace

void add_optimizer_cases(std::vector<CaseSpec>& table) {
  for (const auto* model : {&kSmolLm2, &kLlama8b}) {
    double parameters = 0;
    for (const auto size : adapter_sizes(*model)) parameters += static_cast<double>(size);
    table.push_back({"adamw",
                     model->name,
                     "lora/rank:" + std::to_string(kRank),
                     {.read = 16 * parameters, .written = 12 * parameters},
                     maker<AdamW>(*model)});
  }
}

}  // namespace flexcore::cases
