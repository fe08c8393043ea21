#include "cases/array.h"
#include "cases/models.h"
#include "cases/op_case.h"
#include "ops/cross_entropy.h"
#include "ops/sampling.h"

namespace flexcore::cases {

namespace {

constexpr auto kF32 = DType::kFloat32, kBF16 = DType::kBFloat16;

class CrossEntropy {
 public:
  CrossEntropy(OpContext& context, const ModelShape& model, std::int64_t rows)
      : hidden_(kBF16, {rows, model.hidden_size}, Noise{1, 2.0f}),
        weight_(context, kBF16, model.vocab_size, model.hidden_size, 2),
        loss_(kF32, {rows}),
        scale_(kF32, {rows}, 1.0f),
        grad_(kF32, {rows, model.hidden_size}),
        labels_(some_labels(rows, model.vocab_size)) {}
  void run(OpContext& context) {
    flexcore::run(context, LinearCrossEntropyArgs{hidden_.view(), weight_.view(), labels_.view(), loss_.view(),
                                                  scale_.view(), grad_.view()});
  }
  /// The last row's loss and some of its gradient.
  Accuracy check() const {
    Accuracy accuracy{.allowed = 2 * epsilon(kBF16)};
    const std::int64_t row = loss_.size() - 1, vocab = weight_.view().out_features, width = weight_.view().in_features;
    const std::int64_t label = labels_.view().as<std::int32_t>()[row], columns[] = {0, width / 2, width - 1};
    std::vector<double> x;
    for (std::int64_t k = 0; k < width; ++k) x.push_back(hidden_.at(row, k));
    double total = 0, target = 0, mean[3] = {};
    for (std::int64_t v = 0; v < vocab; ++v) {
      double logit = 0;
      for (std::int64_t k = 0; k < width; ++k) logit += x[static_cast<std::size_t>(k)] * weight_.at(v, k);
      if (v == label) target = logit;
      const double p = std::exp(logit);
      total += p;
      for (int c = 0; c < 3; ++c) mean[c] += p * weight_.at(v, columns[c]);
    }
    accuracy.see(loss_[row], std::log(total) - target);
    for (int c = 0; c < 3; ++c)
      accuracy.see(grad_.at(row, columns[c]), mean[c] / total - weight_.at(label, columns[c]));
    return accuracy;
  }

 private:
  static std::vector<std::int32_t> some_labels(std::int64_t rows, std::int64_t vocab_size) {
    std::vector<std::int32_t> labels;
    for (std::int64_t i = 0; i < rows; ++i) labels.push_back(static_cast<std::int32_t>((i + 1) * 7919 % vocab_size));
    return labels;
  }

  Array hidden_;
  PackedNoise weight_;
  Array loss_, scale_, grad_;
  Integers labels_;
};

class Sampling {
 public:
  Sampling(OpContext&, const ModelShape& model, std::int64_t rows, bool greedy)
      : logits_(kF32, {rows, model.vocab_size}, Noise{1, 3.0f}), results_(static_cast<std::size_t>(rows)) {
    for (std::int64_t i = 0; i < rows; ++i) {
      SamplingRow row{.temperature = greedy ? 0.0f : 0.8f, .seed = static_cast<std::uint64_t>(i)};
      if (!greedy) row.top_p = 0.95f, row.top_k = 50;
      rows_.push_back(row);
    }
  }
  void run(OpContext& context) { flexcore::run(context, SampleArgs{logits_.view(), rows_, results_}); }
  /// The token is the best, or among the best k; its log-probability is that of the raw logits.
  Accuracy check() const {
    Accuracy accuracy{.allowed = 1e-4};
    const std::int64_t vocab = logits_.view().shape(1);
    const Noise noise{1, 3.0f};  // the op may have overwritten the logits
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const auto at = [&](std::int64_t v) { return noise(static_cast<std::int64_t>(i) * vocab + v); };
      const float chosen = at(results_[i].token);
      double total = 0;
      std::int64_t better = 0;
      for (std::int64_t v = 0; v < vocab; ++v) {
        total += std::exp(static_cast<double>(at(v)));
        better += at(v) > chosen;
      }
      accuracy.see(results_[i].logprob, chosen - std::log(total));
      if (better >= std::max(rows_[i].top_k, 1)) accuracy.worst = std::numeric_limits<double>::infinity();
    }
    return accuracy;
  }

 private:
  Array logits_;
  std::vector<SamplingRow> rows_;
  std::vector<SamplingResult> results_;
};

}  // namespace

void add_cross_entropy_cases(std::vector<CaseSpec>& table) {
  const auto add = [&](const ModelShape& model, std::int64_t rows) {
    const auto n = static_cast<double>(rows), hidden = static_cast<double>(model.hidden_size);
    const double weights = static_cast<double>(model.vocab_size) * hidden;
    // Logits forth, gradient back: two products.
    table.push_back({"linear_cross_entropy",
                     model.name,
                     "bfloat16/tokens:" + std::to_string(rows),
                     {.read = 2 * (weights + n * hidden),
                      .written = 4 * n * hidden,
                      .flops = 4 * n * weights,
                      .rate = Rate::kBFloat16},
                     maker<CrossEntropy>(model, rows)});
  };
  add(kSmolLm2, 16);
  add(kSmolLm2, 128);
  add(kSmolLm2, 512);
  add(kLlama8b, 16);
}

void add_sampling_cases(std::vector<CaseSpec>& table) {
  for (const auto* model : {&kSmolLm2, &kLlama8b})
    for (const bool greedy : {true, false})
      table.push_back({"sample",
                       model->name,
                       std::string(greedy ? "greedy" : "top_k:50,top_p:0.95") + "/tokens:16",
                       {.read = 4.0 * 16 * static_cast<double>(model->vocab_size)},
                       maker<Sampling>(*model, std::int64_t{16}, greedy)});
}

}  // namespace flexcore::cases
