#include <numeric>

#include "cases/array.h"
#include "cases/models.h"
#include "cases/op_case.h"
#include "ops/attention.h"

namespace flexcore::cases {

namespace {

/// `batch` sequences, each with rows [length - rows, length) in the batch.
struct Shape {
  ModelShape model;
  std::int64_t batch, rows, length;
  std::int64_t blocks() const { return (length + kBlockSize - 1) / kBlockSize; }
  std::int64_t num_tokens() const { return batch * rows; }
  /// Pairs (row, position that it sees) of the whole batch.
  double pairs() const { return static_cast<double>(num_tokens()) * (static_cast<double>(length) - 0.5 * (rows - 1)); }
};

constexpr auto kBF16 = DType::kBFloat16;

/// Pages, filled; a sequence's pages lie apart from one another, as after some hours of service.
class World {
 public:
  explicit World(const Shape& shape)
      : shape(shape),
        keys(kBF16, {shape.batch * shape.blocks(), shape.model.num_kv_heads, kBlockSize, shape.model.head_dim},
             Noise{3}),
        values(kBF16, {shape.batch * shape.blocks(), shape.model.num_kv_heads, kBlockSize, shape.model.head_dim},
               Noise{4}),
        q(kBF16, {shape.num_tokens(), shape.model.num_heads, shape.model.head_dim}, Noise{5}),
        y(kBF16, {shape.num_tokens(), shape.model.num_heads, shape.model.head_dim}),
        lse(DType::kFloat32, {shape.num_tokens(), shape.model.num_heads}),
        table_(static_cast<std::size_t>(shape.batch * shape.blocks())) {
    const auto blocks = static_cast<std::int64_t>(table_.size());
    std::int64_t step = 2 * blocks / 3 + 1;
    while (std::gcd(step, blocks) != 1) ++step;
    for (std::int64_t i = 0; i < blocks; ++i)
      table_[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i * step % blocks);
    for (std::int64_t s = 0; s < shape.batch; ++s)
      spans.push_back({s * shape.rows, (s + 1) * shape.rows, shape.length - shape.rows,
                       &table_[static_cast<std::size_t>(s * shape.blocks())]});
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  KvPages pages() const { return {keys.view(), values.view()}; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(shape.model.head_dim)); }
  void forward(OpContext& context) {
    run(context, AttentionArgs{q.view(), pages(), spans, y.view(), lse.view(), scale()});
  }

  std::int64_t kv_head(std::int64_t head) const { return head / (shape.model.num_heads / shape.model.num_kv_heads); }
  /// First element of a key or value in its pages.
  std::int64_t page_at(std::int64_t sequence, std::int64_t position, std::int64_t kv_head) const {
    const std::int64_t page = table_[static_cast<std::size_t>(sequence * shape.blocks() + position / kBlockSize)];
    return ((page * shape.model.num_kv_heads + kv_head) * kBlockSize + position % kBlockSize) * shape.model.head_dim;
  }
  std::int64_t row_at(std::int64_t row, std::int64_t head) const {
    return (row * shape.model.num_heads + head) * shape.model.head_dim;
  }
  double dot(const Array& a, std::int64_t at, const Array& b, std::int64_t bt) const {
    double sum = 0;
    for (std::int64_t d = 0; d < shape.model.head_dim; ++d) sum += a[at + d] * b[bt + d];
    return sum;
  }
  /// exp(score) of a row and the positions that it sees; `total` is their sum.
  std::vector<double> weights(std::int64_t row, std::int64_t head, double& total) const {
    const std::int64_t sequence = row / shape.rows, last = shape.length - shape.rows + row % shape.rows;
    std::vector<double> p;
    total = 0;
    for (std::int64_t j = 0; j <= last; ++j) {
      p.push_back(std::exp(scale() * dot(q, row_at(row, head), keys, page_at(sequence, j, kv_head(head)))));
      total += p.back();
    }
    return p;
  }

  Shape shape;
  Array keys, values, q, y, lse;
  std::vector<AttentionSpan> spans;

 private:
  std::vector<std::int32_t> table_;
};

class Forward {
 public:
  Forward(OpContext&, const Shape& shape) : world_(shape) {}
  void run(OpContext& context) { world_.forward(context); }
  Accuracy check() const {
    Accuracy accuracy{.allowed = 2 * epsilon(kBF16)};
    const auto& model = world_.shape.model;
    sample(world_.shape.num_tokens(), 5, [&](std::int64_t row) {
      sample(model.num_heads, 3, [&](std::int64_t head) {
        double total = 0;
        const auto p = world_.weights(row, head, total);
        accuracy.see(world_.lse.at(row, head), std::log(total));
        sample(model.head_dim, 3, [&](std::int64_t d) {
          double sum = 0;
          for (std::size_t j = 0; j < p.size(); ++j)
            sum += p[j] / total *
                   world_.values[world_.page_at(row / world_.shape.rows, static_cast<std::int64_t>(j),
                                                world_.kv_head(head)) +
                                 d];
          accuracy.see(world_.y[world_.row_at(row, head) + d], sum);
        });
      });
    });
    return accuracy;
  }

 private:
  World world_;
};

class Backward {
 public:
  Backward(OpContext& context, const Shape& shape)
      : world_(shape),
        grad_y_(kBF16, {shape.num_tokens(), shape.model.num_heads, shape.model.head_dim}, Noise{6}),
        grad_q_(kBF16, {shape.num_tokens(), shape.model.num_heads, shape.model.head_dim}),
        grad_k_rows_(kBF16, {shape.num_tokens(), shape.model.num_kv_heads, shape.model.head_dim}),
        grad_v_rows_(kBF16, {shape.num_tokens(), shape.model.num_kv_heads, shape.model.head_dim}) {
    world_.forward(context);
    for (std::int64_t s = 0; s < shape.batch; ++s) {
      for (auto* sums : {&grad_k_, &grad_v_})
        sums->emplace_back(DType::kFloat32,
                           std::initializer_list{shape.length, shape.model.num_kv_heads, shape.model.head_dim}, 0.0f);
      spans_.push_back({world_.spans[static_cast<std::size_t>(s)], grad_k_.back().floats(), grad_v_.back().floats()});
    }
  }
  void run(OpContext& context) {
    flexcore::run(context, AttentionBackwardArgs{grad_y_.view(), world_.q.view(), world_.y.view(), world_.lse.view(),
                                                 world_.pages(), spans_, grad_q_.view(), grad_k_rows_.view(),
                                                 grad_v_rows_.view(), world_.scale()});
  }
  /// Of sequence 0: gradients of q at some rows, and of the values at some positions.
  Accuracy check() const {
    Accuracy accuracy{.allowed = 4 * epsilon(kBF16)};
    const auto& shape = world_.shape;
    const std::int64_t head = shape.model.num_heads - 1, kv = world_.kv_head(head);
    const std::int64_t group = shape.model.num_heads / shape.model.num_kv_heads, first = shape.length - shape.rows;
    sample(shape.rows, 3, [&](std::int64_t row) {
      double total = 0;
      const auto p = world_.weights(row, head, total);
      const double delta = world_.dot(world_.y, world_.row_at(row, head), grad_y_, world_.row_at(row, head));
      sample(shape.model.head_dim, 3, [&](std::int64_t d) {
        double sum = 0;
        for (std::size_t j = 0; j < p.size(); ++j) {
          const std::int64_t at = world_.page_at(0, static_cast<std::int64_t>(j), kv);
          const double grad_p = world_.dot(grad_y_, world_.row_at(row, head), world_.values, at);
          sum += world_.scale() * p[j] / total * (grad_p - delta) * world_.keys[at + d];
        }
        accuracy.see(grad_q_[world_.row_at(row, head) + d], sum);
      });
    });
    // The last rows are seen by few others, so their sums are short.
    for (const std::int64_t row : {shape.rows - 1, std::max<std::int64_t>(shape.rows - 3, 0)}) {
      for (std::int64_t d = 0; d < 2; ++d) {
        double sum = 0;
        for (std::int64_t i = row; i < shape.rows; ++i)
          for (std::int64_t h = kv * group; h < (kv + 1) * group; ++h) {
            double total = 0;
            const auto p = world_.weights(i, h, total);
            sum += p[static_cast<std::size_t>(first + row)] / total * grad_y_[world_.row_at(i, h) + d];
          }
        accuracy.see(grad_v_rows_[(row * shape.model.num_kv_heads + kv) * shape.model.head_dim + d], sum);
      }
    }
    return accuracy;
  }

 private:
  World world_;
  Array grad_y_, grad_q_, grad_k_rows_, grad_v_rows_;
  std::vector<Array> grad_k_, grad_v_;
  std::vector<AttentionBackwardSpan> spans_;
};

void add(std::vector<CaseSpec>& table, const char* op, const Shape& shape) {
  const auto& m = shape.model;
  const std::string name = "batch:" + std::to_string(shape.batch) + "/rows:" + std::to_string(shape.rows) +
                           "/length:" + std::to_string(shape.length);
  const double rows = static_cast<double>(shape.num_tokens() * m.num_heads * m.head_dim);
  const double kv = static_cast<double>(2 * shape.batch * shape.length * m.num_kv_heads * m.head_dim);
  const double new_kv = static_cast<double>(2 * shape.num_tokens() * m.num_kv_heads * m.head_dim);
  const double products = shape.pairs() * static_cast<double>(m.num_heads * m.head_dim);
  const double lse = sizeof(float) * static_cast<double>(shape.num_tokens() * m.num_heads);
  // Probabilities are float32, so every product is; the backward has five where the forward has two.
  if (std::string(op) == "attention_backward")
    table.push_back(
        {op,
         m.name,
         name,
         {.read = 2 * (3 * rows + kv) + lse + 4 * kv, .written = 2 * (rows + new_kv) + 4 * kv, .flops = 10 * products},
         maker<Backward>(shape)});
  else
    table.push_back({op,
                     m.name,
                     name,
                     {.read = 2 * (rows + kv), .written = 2 * rows + lse, .flops = 4 * products},
                     maker<Forward>(shape)});
}

}  // namespace

void add_attention_cases(std::vector<CaseSpec>& table) {
  add(table, "attention_decode", {kSmolLm2, 1, 1, 1024});
  add(table, "attention_decode", {kSmolLm2, 16, 1, 512});
  add(table, "attention_decode", {kLlama8b, 1, 1, 1024});
  add(table, "attention_decode", {kLlama8b, 16, 1, 512});
  add(table, "attention_prefill", {kSmolLm2, 1, 512, 512});
  add(table, "attention_prefill", {kSmolLm2, 1, 512, 1024});
  add(table, "attention_prefill", {kLlama8b, 1, 256, 512});
  add(table, "attention_backward", {kSmolLm2, 1, 512, 512});
  add(table, "attention_backward", {kSmolLm2, 1, 128, 512});
  add(table, "attention_backward", {kLlama8b, 1, 256, 256});
}

}  // namespace flexcore::cases
