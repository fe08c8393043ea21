#include <algorithm>
#include <cmath>

#include "parallel/model_run.h"

namespace flexcore::test {

namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

}  // namespace

std::int64_t ModelRun::head_of(const Sharded& x, int rank, std::int64_t head_dim) const {
  return local_shape(x.state, x.rows, x.features, rank, ranks_.count()).features.begin / head_dim;
}

// Causal attention of a rank's query heads over all rows; of copied keys and values it takes the heads that are theirs.
// With a gradient of the output, adds those of q, k and v instead.
Block ModelRun::attend(int rank, const Node& node, const Block* grad, Block* grad_q, Block* grad_k, Block* grad_v) {
  const Sharded &all_q = value(node.inputs[0]), &all_k = value(node.inputs[1]), &all_v = value(node.inputs[2]);
  const Block &q = all_q.local[at(rank)], &k = all_k.local[at(rank)], &v = all_v.local[at(rank)];
  const std::int64_t dim = node.op->coupling().features, group = all_q.features / all_k.features;
  const double scale = 1 / std::sqrt(static_cast<double>(dim));
  Block y(q.rows, q.features);
  std::vector<double> p(at(q.rows));
  for (std::int64_t h = 0; h < q.features / dim; ++h) {
    const std::int64_t a = h * dim, b = ((head_of(all_q, rank, dim) + h) / group - head_of(all_k, rank, dim)) * dim;
    require<Error>(b >= 0 && b + dim <= k.features, "rank ", rank, " has not the keys of its query head ", h);
    for (std::int64_t i = 0; i < q.rows; ++i) {
      double total = 0;
      for (std::int64_t j = 0; j <= i; ++j) {
        double score = 0;
        for (std::int64_t d = 0; d < dim; ++d) score += static_cast<double>(q.at(i, a + d)) * k.at(j, b + d);
        total += p[at(j)] = std::exp(score * scale);
      }
      double along = 0;
      for (std::int64_t d = 0; d < dim; ++d) {
        double sum = 0;
        for (std::int64_t j = 0; j <= i; ++j) sum += p[at(j)] / total * v.at(j, b + d);
        y.at(i, a + d) = static_cast<float>(sum);
        if (grad != nullptr) along += sum * grad->at(i, a + d);
      }
      if (grad == nullptr) continue;
      for (std::int64_t j = 0; j <= i; ++j) {
        const double weight = p[at(j)] / total;
        double grad_p = 0;
        for (std::int64_t d = 0; d < dim; ++d) grad_p += static_cast<double>(grad->at(i, a + d)) * v.at(j, b + d);
        const double grad_s = weight * (grad_p - along) * scale;
        for (std::int64_t d = 0; d < dim; ++d) {
          grad_q->at(i, a + d) += static_cast<float>(grad_s * k.at(j, b + d));
          grad_k->at(j, b + d) += static_cast<float>(grad_s * q.at(i, a + d));
          grad_v->at(j, b + d) += static_cast<float>(weight * grad->at(i, a + d));
        }
      }
    }
  }
  return y;
}

// Exact over a split vocabulary: the largest logit of a row, the sum of exponentials and the target's logit are taken
// over the ranks, then each has its vocabulary's part of the gradient.
void ModelRun::cross_entropy(const Node& node) {
  const TensorId out = node.outputs[0];
  const Sharded& x = value(node.inputs[0]);
  const Sharded& table = weight(node.op->params()[0]);
  const Sharded logits = local_product(ranks_, x, transpose(table), kFeatureSplit);
  const std::int64_t rows = x.rows;
  Sharded most = ranks_.zeros(kPending, rows, 1);
  for (std::size_t r = 0; r < logits.local.size(); ++r)
    for (std::int64_t t = 0; t < rows; ++t) {
      float& value = most.local[r].at(t, 0);
      value = -1e30f;
      for (std::int64_t j = 0; j < logits.local[r].features; ++j) value = std::max(value, logits.local[r].at(t, j));
    }
  most = ranks_.largest(most);
  Sharded sums = ranks_.zeros(kPending, rows, 2);  // of exponentials; the target's logit
  const auto target = [&](std::int64_t t) { return tokens_[at(t + 1)]; };
  for (std::size_t r = 0; r < logits.local.size(); ++r) {
    const Share mine = share_of(table.rows, static_cast<int>(r), ranks_.count());
    for (std::int64_t t = 0; t < rows; ++t)
      for (std::int64_t j = 0; j < mine.size(); ++j) {
        const float logit = logits.local[r].at(t, j) - most.local[r].at(t, 0);
        sums.local[r].at(t, 0) += std::exp(logit);
        if (mine.begin + j == target(t)) sums.local[r].at(t, 1) += logit;
      }
  }
  sums = ranks_.move(sums, kReplicated);
  losses_ = Block(rows, 1);
  for (std::int64_t t = 0; t < rows; ++t) losses_.at(t, 0) = std::log(sums.local[0].at(t, 0)) - sums.local[0].at(t, 1);
  Sharded slope = ranks_.zeros(kFeatureSplit, rows, table.rows);  // softmax - onehot
  for (std::size_t r = 0; r < logits.local.size(); ++r) {
    const Share mine = share_of(table.rows, static_cast<int>(r), ranks_.count());
    for (std::int64_t t = 0; t < rows; ++t)
      for (std::int64_t j = 0; j < mine.size(); ++j)
        slope.local[r].at(t, j) = std::exp(logits.local[r].at(t, j) - most.local[r].at(t, 0)) / sums.local[r].at(t, 0) -
                                  (mine.begin + j == target(t) ? 1.0f : 0.0f);
  }
  made(out, local_product(ranks_, slope, table, kPending));
  contribute(node.inputs[0], value(out));
}

}  // namespace flexcore::test
