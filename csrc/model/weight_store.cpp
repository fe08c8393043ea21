#include "model/weight_store.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "model/floats.h"
#include "ops/registry.h"

namespace flexcore {

namespace {

constexpr std::size_t kAlignment = 64;

std::vector<std::int64_t> shape_of(const WeightSpec& spec) {
  if (spec.in_features == 0) return {spec.out_features};
  return {spec.out_features, spec.in_features};
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const auto extent : shape) text += str(text.empty() ? "" : ", ", extent);
  return "[" + text + "]";
}

/// The tensor that a spec names, its shape and dtype checked.
const SafetensorsModel::Entry* find_source(const SafetensorsModel& model, const WeightSpec& spec) {
  const auto* source = model.find(spec.name);
  const auto wanted = shape_of(spec);
  require<ModelLoadError>(source != nullptr, model.path(), ": no tensor ", spec.name, ", wanted ", shape_text(wanted));
  require<ModelLoadError>(source->shape == wanted, model.describe(*source), ": shape ", shape_text(source->shape),
                          ", wanted ", shape_text(wanted));
  require<Unsupported>(source->dtype == "F32" || source->dtype == "BF16" || source->dtype == "F16",
                       model.describe(*source), ": dtype ", source->dtype, ", wanted F32, BF16 or F16");
  return source;
}

}  // namespace

WeightStore::WeightStore(OpContext& context, Allocator& allocator, MemoryLedger& ledger, DType dtype,
                         WeightFormat format)
    : context_(context), allocator_(allocator), ledger_(ledger), dtype_(dtype), format_(format) {}

WeightStore::Table WeightStore::make_table(OpContext& context, std::span<const WeightSpec> specs, DType dtype,
                                           WeightFormat format) {
  Table table;
  table.entries.reserve(specs.size());  // the names' addresses are keys
  for (const auto& spec : specs) {
    const auto twin = table.by_name.find(spec.name);
    if (twin != table.by_name.end()) {
      auto& other = table.entries[twin->second].spec;
      require(shape_of(other) == shape_of(spec), "weights: ", spec.name, ": asked for as ", shape_text(shape_of(other)),
              " and as ", shape_text(shape_of(spec)));
      other.quantizable = other.quantizable && spec.quantizable;
      continue;
    }
    table.entries.push_back({spec, Tier::kDevice, 0});
    table.by_name.emplace(table.entries.back().spec.name, table.entries.size() - 1);
  }
  // Matrices first: those that are asked for one after the other lie side by side, whatever vectors there are between.
  for (const bool matrices : {true, false})
    for (auto& entry : table.entries) {
      const WeightSpec& spec = entry.spec;
      if ((spec.in_features > 0) != matrices) continue;
      std::size_t bytes = static_cast<std::size_t>(spec.out_features) * sizeof(float);
      if (matrices)
        run(context, PackedWeightBytesArgs{spec.out_features, spec.in_features, dtype, &bytes,
                                           spec.quantizable ? format : WeightFormat{}});
      entry.offset = table.bytes;
      table.bytes += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
  return table;
}

std::size_t WeightStore::planned_bytes(OpContext& context, std::span<const WeightSpec> specs, DType dtype,
                                       WeightFormat format) {
  return make_table(context, specs, dtype, format).bytes;
}

void WeightStore::load(const SafetensorsModel& model, std::span<const WeightSpec> specs) {
  Table table = make_table(context_, specs, dtype_, format_);
  // In the order of the file, so that a disk reads ahead.
  std::vector<std::pair<const SafetensorsModel::Entry*, const Entry*>> work;
  for (const auto& entry : table.entries) work.emplace_back(find_source(model, entry.spec), &entry);
  std::sort(work.begin(), work.end());

  Buffer buffer(allocator_, ledger_, MemoryTag::kWeights, table.bytes);
  for (std::size_t i = 0; i < work.size(); ++i) {
    const auto& [source, entry] = work[i];
    if (i + 1 < work.size()) model.prefetch(*work[i + 1].first);
    check_finite(model, *source, entry->spec);
    fill(model, *source, *entry, buffer.data() + entry->offset);
    model.release(*source);
  }
  table_ = std::move(table);
  buffer_ = std::move(buffer);
}

void WeightStore::check_finite(const SafetensorsModel& model, const SafetensorsModel::Entry& source,
                               const WeightSpec& spec) const {
  constexpr std::int64_t kGrain = 1 << 16;
  const TensorView view = model.tensor(source.name);
  // Parameters of groups are bfloat16.
  const DType target = format_of(spec).quantized() ? DType::kBFloat16 : spec.in_features > 0 ? dtype_ : DType::kFloat32;
  std::atomic<bool> finite{true};
  context_.threads->parallel_for(view.size(), kGrain, [&](std::int64_t begin, std::int64_t end, int) {
    if (!all_finite(view, begin, end, target)) finite.store(false, std::memory_order_relaxed);
  });
  require<ModelLoadError>(finite.load(), model.describe(source), ": holds NaN, infinity or a number beyond ",
                          dtype_name(target));
}

void WeightStore::fill(const SafetensorsModel& model, const SafetensorsModel::Entry& source, const Entry& entry,
                       std::byte* out) const {
  TensorView view = model.tensor(source.name);
  if (entry.spec.in_features == 0) {
    std::vector<float> values(static_cast<std::size_t>(entry.spec.out_features));
    to_float32(view, values.data());
    allocator_.upload(out, values.data(), values.size() * sizeof(float));
    return;
  }
  // Few writers leave tensors at odd bytes; those go through an aligned copy.
  Buffer aligned;
  if (reinterpret_cast<std::uintptr_t>(view.data()) % dtype_size(view.dtype()) != 0) {
    aligned = Buffer(host_allocator(), ledger_, MemoryTag::kWorkspace, view.bytes());
    std::memcpy(aligned.data(), view.data(), view.bytes());
    view = TensorView(aligned.data(), view.dtype(), {entry.spec.out_features, entry.spec.in_features});
  }
  run(context_, PackWeightArgs{view, dtype_, out, format_of(entry.spec)});
}

const WeightStore::Entry& WeightStore::find(std::string_view name, bool matrix) const {
  const auto found = table_.by_name.find(name);
  require(found != table_.by_name.end(), "weights: ", name, " was not loaded");
  const Entry& entry = table_.entries[found->second];
  require((entry.spec.in_features > 0) == matrix, "weights: ", name, " is a ", matrix ? "vector" : "matrix",
          ", wanted a ", matrix ? "matrix" : "vector");
  return entry;
}

WeightView WeightStore::matrix(std::string_view name) const {
  const Entry& entry = find(name, true);
  return {buffer_.data() + entry.offset, dtype_, entry.spec.out_features,
          entry.spec.in_features,        true,   format_of(entry.spec)};
}

TensorView WeightStore::vector(std::string_view name) const {
  const Entry& entry = find(name, false);
  return buffer_.view(DType::kFloat32, {entry.spec.out_features}, entry.offset);
}

}  // namespace flexcore
