#include "ops/scatter.h"

#include <cstring>

#include "backends/cpu/families.h"
#include "backends/cpu/kernels/groups8.h"
#include "backends/cpu/rows.h"
#include "ops/rows.h"

namespace flexcore::cpu {

namespace {

static_assert(kCodeGroup == kGroupWidth);

void zero(OpContext& context, const ZeroArgs& args) {
  constexpr std::int64_t kGrain = 1 << 16;  // bytes
  auto* data = args.y.as<std::byte>();
  context.threads->parallel_for(static_cast<std::int64_t>(args.y.bytes()), kGrain,
                                [&](std::int64_t begin, std::int64_t end, int) {
                                  std::memset(data + begin, 0, static_cast<std::size_t>(end - begin));
                                });
}

void scatter_rows(OpContext&, const ScatterRowsArgs& args) {
  const auto* index = args.index.as<std::int32_t>();
  const auto bytes = static_cast<std::size_t>(args.x.shape(1)) * sizeof(float);
  for (std::int64_t i = 0; i < args.x.shape(0); ++i) {
    require(index[i] >= 0 && index[i] < args.y.shape(0), "scatter_rows: index ", index[i], " of ", args.y.shape(0));
    std::memcpy(args.y.row<float>(index[i]), args.x.row<float>(i), bytes);
  }
}

// As codes in groups.
void quantize_rows(OpContext& context, const SaveRowsArgs& args, const SaveSpan& span) {
  const std::int64_t width = args.x.shape(1), stride = kept_row_bytes(DType::kUInt8, width);
  const TensorView x = args.x.rows(span.row_begin, span.row_end);
  auto* codes = reinterpret_cast<std::uint8_t*>(span.store + args.offset * static_cast<std::size_t>(span.length)) +
                span.position * stride;
  const QuantizeRows rows{in(x), codes, stride, width};
  context.threads->parallel_for(x.shape(0), grain(width), [&](std::int64_t begin, std::int64_t end, int) {
    groups8_kernels().quantize[type_index(x)](rows, begin, end);
  });
}

void load_rows(OpContext& context, const LoadRowsArgs& args) {
  const std::int64_t width = args.y.shape(1);
  const DequantizeRows rows{args.x.as<std::uint8_t>(), args.x.stride(0), width, out(args.y)};
  context.threads->parallel_for(args.y.shape(0), grain(width), [&](std::int64_t begin, std::int64_t end, int) {
    groups8_kernels().dequantize[type_index(args.y)](rows, begin, end);
  });
}

void save_rows(OpContext& context, const SaveRowsArgs& args) {
  for (const auto& span : args.spans) {
    if (args.dtype == DType::kUInt8) {
      if (span.row_begin < span.row_end) quantize_rows(context, args, span);
      continue;
    }
    const TensorView tensor(span.store + args.offset * static_cast<std::size_t>(span.length), args.dtype,
                            {span.length, args.x.shape(1)});
    const std::int64_t rows = span.row_end - span.row_begin;
    if (rows > 0)
      run(context,
          CopyArgs{args.x.rows(span.row_begin, span.row_end), tensor.rows(span.position, span.position + rows)});
  }
}

}  // namespace

void register_scatter(OpRegistry& registry) {
  registry.add<ZeroArgs>(DeviceKind::kCpu, zero);
  registry.add<ScatterRowsArgs>(DeviceKind::kCpu, scatter_rows);
  registry.add<SaveRowsArgs>(DeviceKind::kCpu, save_rows);
  registry.add<LoadRowsArgs>(DeviceKind::kCpu, load_rows);
}

}  // namespace flexcore::cpu
