#include "ops/linear.h"

#include <algorithm>
#include <array>
#include <vector>

#include "backends/cpu/families.h"
#include "backends/cpu/packed_weight.h"
#include "backends/cpu/scratch.h"
#include "core/number.h"

namespace flexcore::cpu {

namespace {

// Panels that one worker takes at once: with a range of k they stay in the second-level cache while rows pass by.
constexpr std::int64_t kPanelsAtOnce = 3;
// Length of a range of k (of n in the backward): a panel of floats is 64 KiB.
constexpr std::int64_t kRange = 1024;
// The same where panels are dequantised first: three of them are 24 KiB of floats.
constexpr std::int64_t kQuantizedRange = 128;
// Rows between two visits to the same weights; bounds the scratch for accumulators.
constexpr std::int64_t kRowsAtOnce = 1024;
// From so many rows on, bfloat16 panels are widened once for all of them: the tile of floats is the larger one. The
// additions are the same, and so are the bits.
constexpr std::int64_t kRowsToWiden = 32;

bool is_bfloat16(const WeightView& weight) { return weight.dtype == DType::kBFloat16; }
bool as_pairs(const WeightView& weight) { return is_bfloat16(weight) && gemm_kernels().pairs; }

/// A matrix in the form that `multiply` reads.
struct Operand {
  const std::byte* data = nullptr;
  std::int64_t stride = 0;  // elements
  std::int64_t element_bytes = 4;

  const void* at(std::int64_t row, std::int64_t k) const { return data + (row * stride + k) * element_bytes; }
};

// `x` itself where its elements already are as wanted, else a converted copy in scratch.
Operand make_operand(OpContext& context, const TensorView& x, const WeightView& weight) {
  const bool pairs = as_pairs(weight);
  const std::int64_t rows = x.shape(0), k = x.shape(1);
  const bool as_it_is = pairs ? x.dtype() == DType::kBFloat16 && k % 2 == 0 && x.stride(0) % 2 == 0 &&
                                    reinterpret_cast<std::uintptr_t>(x.data()) % 4 == 0
                              : x.dtype() == DType::kFloat32 && !is_bfloat16(weight);
  const std::int64_t element_bytes = pairs ? 2 : 4;
  if (as_it_is) return {x.as<std::byte>(), x.stride(0), element_bytes};
  std::int64_t stride = round_up(k, 2);
  if (stride * element_bytes % 1024 == 0) stride += 64 / element_bytes;  // rows in different cache sets
  auto* out =
      static_cast<std::byte*>(context.scratch->allocate(static_cast<std::size_t>(rows * stride * element_bytes)));
  context.threads->parallel_for(
      rows, std::max<std::int64_t>(1, (1 << 15) / k), [&](std::int64_t begin, std::int64_t end, int) {
        gemm_kernels().convert_rows(
            {.x = x.as<std::byte>() + begin * x.stride(0) * static_cast<std::int64_t>(dtype_size(x.dtype())),
             .from = element(x.dtype()),
             .stride = x.stride(0),
             .rows = end - begin,
             .k = k,
             .padded_k = stride,
             .weight = element(weight.dtype),
             .out = out + begin * stride * element_bytes});
      });
  return {out, stride, element_bytes};
}

/// Panels [begin, end) of one member and rows [row_begin, row_end): what a worker takes at once.
struct Unit {
  std::size_t member = 0;
  std::int64_t begin = 0, end = 0;
  std::int64_t row_begin = 0, row_end = 0;
};

/// Cuts `panels[member]` and the rows into units of about equal size, a multiple of the workers where it can.
class Units {
 public:
  Units(std::vector<std::int64_t> panels, std::int64_t rows, int workers) : panels_(std::move(panels)), rows_(rows) {
    std::int64_t total = 0;
    for (const auto count : panels_) total += count;
    const std::int64_t rounds = divide_up(total, workers * kPanelsAtOnce);
    chunk_ = std::max<std::int64_t>(1, divide_up(total, std::max<std::int64_t>(1, rounds * workers)));
    std::int64_t chunks = 0;
    for (const auto count : panels_) chunks += divide_up(count, chunk_);
    // Few panels and many workers: the rows are split too.
    const std::int64_t splits =
        std::max(divide_up(rows, kRowsAtOnce),
                 std::min(divide_up(workers, std::max<std::int64_t>(1, chunks)), divide_up(rows, 64)));
    row_chunk_ = round_up(divide_up(rows, splits), gemm_kernels().tile_rows);
  }
  std::int64_t chunk() const { return chunk_; }
  std::int64_t row_chunk() const { return std::min(row_chunk_, rows_); }

  template <class Body>
  void run(ThreadPool& threads, Body&& body) const {
    const std::int64_t row_chunks = divide_up(rows_, row_chunk_);
    std::int64_t chunks = 0;
    for (const auto count : panels_) chunks += divide_up(count, chunk_);
    threads.parallel_for_each(chunks * row_chunks, [&](std::int64_t index, int worker) {
      Unit unit;
      std::int64_t chunk = index / row_chunks;
      for (; chunk >= divide_up(panels_[unit.member], chunk_); ++unit.member)
        chunk -= divide_up(panels_[unit.member], chunk_);
      unit.begin = chunk * chunk_;
      unit.end = std::min(unit.begin + chunk_, panels_[unit.member]);
      unit.row_begin = index % row_chunks * row_chunk_;
      unit.row_end = std::min(unit.row_begin + row_chunk_, rows_);
      body(unit, worker);
    });
  }

 private:
  std::vector<std::int64_t> panels_;
  std::int64_t rows_, chunk_, row_chunk_;
};

/// A piece of scratch for every worker.
class WorkerScratch {
 public:
  WorkerScratch(OpContext& context, std::int64_t bytes)
      : bytes_(round_up(bytes, 64)),
        data_(bytes > 0 ? static_cast<std::byte*>(
                              context.scratch->allocate(static_cast<std::size_t>(bytes_ * context.threads->size())))
                        : nullptr) {}
  std::byte* of(int worker) const { return data_ == nullptr ? nullptr : data_ + worker * bytes_; }

 private:
  std::int64_t bytes_;
  std::byte* data_;
};

void multiply(const GemmBlock& block, bool pairs_of_b) {
  pairs_of_b ? gemm_kernels().multiply_bfloat16(block) : gemm_kernels().multiply_float32(block);
}

// Ranges of about equal length that begin at multiples of 16.
std::int64_t range_length(std::int64_t k, std::int64_t most = kRange) {
  return round_up(divide_up(k, divide_up(k, most)), kPanelRows);
}

// Rows of a row-major weight as panels in scratch.
void pack_rows(const WeightView& weight, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns,
               void* packed) {
  gemm_kernels().pack_panels(
      {.source = static_cast<const std::byte*>(weight.data) +
                 (row * weight.in_features + column) * static_cast<std::int64_t>(dtype_size(weight.dtype)),
       .from = element(weight.dtype),
       .stride = weight.in_features,
       .rows = rows,
       .k = columns,
       .begin = 0,
       .end = divide_up(rows, kPanelRows),
       .to = element(weight.dtype),
       .packed = packed});
}

// Quantised panels [begin, end) over a range of k, as the dense ones that they stand for, side by side in `out`:
// floats, or pairs where the GEMM multiplies those. Elements from a panel to the next.
std::int64_t dequantize(const WeightView& weight, std::int64_t begin, std::int64_t end, std::int64_t k_begin,
                        std::int64_t k_end, void* out) {
  const QuantizedLayout layout = quantized_layout(weight.format, weight.in_features);
  const std::int64_t out_panel = round_up(k_end - k_begin, 2) * kPanelRows;
  quantized_kernels().dequantize_panels(
      {.layout = layout,
       .packed = static_cast<const std::uint8_t*>(weight.data) + begin * layout.panel_bytes(),
       .panels = end - begin,
       .begin = k_begin,
       .end = k_end,
       .rounded = is_bfloat16(weight),
       .pairs = as_pairs(weight),
       .out = out,
       .out_panel = out_panel});
  return out_panel;
}

// Puts floats in the place of the block's bfloat16 panels.
void widen_panels(GemmBlock& block, std::byte* scratch) {
  auto* out = reinterpret_cast<float*>(scratch);
  for (std::int64_t panel = 0; panel < block.panels; ++panel)
    gemm_kernels().widen_lines({.packed = static_cast<const std::uint16_t*>(block.b) + panel * block.b_panel,
                                .lines = block.k / 2,
                                .out = out + panel * block.k * kPanelRows});
  block.b = out;
  block.b_panel = block.k * kPanelRows;
  block.in_cache = true;
}

void linear(OpContext& context, const LinearArgs& args) {
  const std::int64_t rows = args.x.shape(0), k = args.x.shape(1);
  if (rows == 0) return;
  const Arena::Scope scope(*context.scratch);
  std::array<Operand, 2> operands;  // for float32 and for bfloat16 weights
  std::vector<std::int64_t> panels;
  std::int64_t unpacked_bytes = 0;
  bool quantized = false;
  for (const auto& member : args.members) {
    quantized |= member.weight.format.quantized();
    panels.push_back(divide_up(member.weight.out_features, kPanelRows));
    auto& operand = operands[is_bfloat16(member.weight)];
    if (operand.data == nullptr) operand = make_operand(context, args.x, member.weight);
    if (!member.weight.packed)
      unpacked_bytes = std::max(unpacked_bytes, kPanelRows * packed_depth(member.weight.dtype, k) *
                                                    static_cast<std::int64_t>(dtype_size(member.weight.dtype)));
  }
  const Units units(std::move(panels), rows, context.threads->size());
  // A single tile of rows streams the weights once; splitting k would only cost.
  const bool decode = quantized && rows <= quantized_kernels().tile_rows;
  const bool whole = quantized ? decode : rows <= gemm_kernels().tile_rows;
  const std::int64_t range = whole ? round_up(k, kPanelRows) : range_length(k, quantized ? kQuantizedRange : kRange);
  const WorkerScratch partial(context, range < k ? units.row_chunk() * units.chunk() * kPanelRows * 4 : 0);
  const WorkerScratch unpacked(context, unpacked_bytes * units.chunk());
  const bool widen = operands[1].data != nullptr && !gemm_kernels().pairs && units.row_chunk() >= kRowsToWiden;
  const WorkerScratch floats(context, widen || quantized ? units.chunk() * kPanelRows * round_up(range, 2) * 4 : 0);

  units.run(*context.threads, [&](const Unit& unit, int worker) {
    const auto& member = args.members[unit.member];
    const auto& weight = member.weight;
    const std::int64_t depth = packed_depth(weight.dtype, k),
                       element_bytes = static_cast<std::int64_t>(dtype_size(weight.dtype));
    const std::int64_t column = unit.begin * kPanelRows;
    const std::byte* b =
        static_cast<const std::byte*>(weight.data) + unit.begin * panel_bytes(weight.format, weight.dtype, k);
    if (!weight.packed) {
      b = unpacked.of(worker);
      pack_rows(weight, column, 0, std::min(unit.end * kPanelRows, weight.out_features) - column, k,
                unpacked.of(worker));
    }
    const Operand& a = operands[is_bfloat16(weight)];
    GemmBlock block{.a_stride = a.stride,
                    .rows = unit.row_end - unit.row_begin,
                    .panels = unit.end - unit.begin,
                    .partial = reinterpret_cast<float*>(partial.of(worker)),
                    .y = member.y.as<std::byte>() + (unit.row_begin * member.y.stride(0) + column) *
                                                        static_cast<std::int64_t>(dtype_size(member.y.dtype())),
                    .to = element(member.y.dtype()),
                    .y_stride = member.y.stride(0),
                    .columns = weight.out_features - column,
                    .bias = member.bias ? member.bias.as<float>() + column : nullptr,
                    .accumulate = member.mode == GradMode::kAccumulate};
    for (std::int64_t begin = 0; begin < depth; begin += range) {
      block.a = a.at(unit.row_begin, begin);
      block.k = std::min(range, depth - begin);
      block.first = begin == 0;
      block.last = begin + range >= depth;
      if (decode) {
        block.b = b;
        block.b_panel = panel_bytes(weight.format, weight.dtype, k);
        block.group = weight.format.group_size;
        quantized_kernels().multiply(block, quantized_layout(weight.format, k).codes, is_bfloat16(weight));
        continue;
      }
      if (weight.format.quantized()) {
        block.b = floats.of(worker);
        block.in_cache = true;
        block.b_panel = dequantize(weight, unit.begin, unit.end, begin, begin + block.k, floats.of(worker));
        multiply(block, as_pairs(weight));
        continue;
      }
      block.b = b + begin * kPanelRows * element_bytes;
      block.b_panel = depth * kPanelRows;
      if (widen && is_bfloat16(weight)) widen_panels(block, floats.of(worker));
      multiply(block, is_bfloat16(weight) && !widen);
    }
  });
}

void linear_backward(OpContext& context, const LinearBackwardArgs& args) {
  const std::int64_t rows = args.grad_x.shape(0), k = args.grad_x.shape(1);
  if (rows == 0) return;
  const Arena::Scope scope(*context.scratch);
  std::vector<Operand> operands;
  std::int64_t unpacked_bytes = 0;
  std::int64_t longest = kPanelRows;
  for (const auto& member : args.members) {
    operands.push_back(make_operand(context, member.grad_y, member.weight));
    longest = std::max(longest, range_length(member.weight.out_features));
    if (!member.weight.packed || member.weight.format.quantized()) unpacked_bytes = kPanelRows * 4;
  }
  const Units units({divide_up(k, kPanelRows)}, rows, context.threads->size());
  const WorkerScratch partial(context, units.row_chunk() * units.chunk() * kPanelRows * 4);
  const WorkerScratch transposed(context, units.chunk() * kPanelRows * longest * 4);
  const WorkerScratch unpacked(context, unpacked_bytes * units.chunk() * longest);

  units.run(*context.threads, [&](const Unit& unit, int worker) {
    const std::int64_t column = unit.begin * kPanelRows, columns = std::min(unit.end * kPanelRows, k) - column;
    GemmBlock block{.rows = unit.row_end - unit.row_begin,
                    .panels = unit.end - unit.begin,
                    .in_cache = true,
                    .partial = reinterpret_cast<float*>(partial.of(worker)),
                    .y = args.grad_x.row<float>(unit.row_begin) + column,
                    .y_stride = args.grad_x.stride(0),
                    .columns = columns,
                    .accumulate = args.mode == GradMode::kAccumulate};
    for (std::size_t m = 0; m < args.members.size(); ++m) {
      const auto& weight = args.members[m].weight;
      const std::int64_t n = weight.out_features, range = range_length(n);
      for (std::int64_t begin = 0; begin < n; begin += range) {
        const std::int64_t end = std::min(begin + range, n), padded = round_up(end - begin, kPanelRows);
        TransposePanels transpose{.packed = weight.data,
                                  .weight = element(weight.dtype),
                                  .k = k,
                                  .n_begin = begin,
                                  .n_end = begin + padded,
                                  .k_begin = unit.begin,
                                  .k_end = unit.end,
                                  .out = transposed.of(worker)};
        if (!weight.packed || weight.format.quantized()) {
          transpose.k = columns;
          if (weight.format.quantized()) {
            transpose.k = dequantize(weight, begin / kPanelRows, divide_up(end, kPanelRows), column, column + columns,
                                     unpacked.of(worker)) /
                          kPanelRows;
            if (!as_pairs(weight)) transpose.weight = Element::kFloat32;
          } else {
            pack_rows(weight, begin, column, end - begin, columns, unpacked.of(worker));
          }
          transpose.packed = unpacked.of(worker);
          transpose.n_begin = 0;
          transpose.n_end = padded;
          transpose.k_begin = 0;
          transpose.k_end = unit.end - unit.begin;
        }
        gemm_kernels().transpose_panels(transpose);
        block.a = operands[m].at(unit.row_begin, begin);
        block.a_stride = operands[m].stride;
        block.b = transposed.of(worker);
        block.b_panel = padded * kPanelRows;
        block.k = as_pairs(weight) ? round_up(end - begin, 2) : end - begin;
        block.first = m == 0 && begin == 0;
        block.last = m + 1 == args.members.size() && end == n;
        multiply(block, as_pairs(weight));
      }
    }
  });
}

}  // namespace

std::int64_t linear_scratch(std::int64_t rows, std::int64_t in_features, std::int64_t outputs, std::int64_t num_threads,
                            bool quantized) {
  // A converted copy of x, or of every grad_y; no more than so many columns pad a row.
  constexpr std::int64_t kMembers = 3, kPadding = 34;
  const std::int64_t operands = rows * std::max(in_features + kPadding, outputs + kMembers * kPadding) * 4;
  // Accumulators, and a range of widened, dequantised or transposed panels; dequantised before they are transposed.
  const std::int64_t row_chunk = std::min<std::int64_t>(rows, kRowsAtOnce + gemm_kernels().tile_rows);
  const std::int64_t worker = kPanelsAtOnce * kPanelRows * (row_chunk + (quantized ? 2 : 1) * kRange) * 4;
  return operands + num_threads * (worker + 256) + 1024;
}

void register_linear(OpRegistry& registry) {
  register_packed_weight(registry);
  registry.add<LinearArgs>(DeviceKind::kCpu, linear);
  registry.add<LinearBackwardArgs>(DeviceKind::kCpu, linear_backward);
}

}  // namespace flexcore::cpu
