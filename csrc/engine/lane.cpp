#include "engine/lane.h"

#include <algorithm>

#include "core/check.h"

namespace flexcore {

Lane::Lane(OpContext& context, Allocator& allocator, MemoryLedger& ledger, const ExecutorLimits& limits,
           const Graph& base)
    : context_(&context),
      allocator_(allocator),
      ledger_(ledger),
      indices_(allocator, ledger, MemoryTag::kWorkspace, indices_bytes(limits)),
      segments_(base.sites.size()),
      fixed_segments_(base.sites.size()),
      output_segments_(base.sites.size()),
      output_site_(base.site_at(LinearSite::Place::kOutput)) {
  const auto embedding = static_cast<std::size_t>(base.site_at(LinearSite::Place::kEmbedding));
  for (auto* sites : {&segments_, &fixed_segments_})
    (*sites)[embedding].num_tokens = base.sites[embedding].out_features;
  batch.sites = segments_;
}

Lane::Lane(const OpContext& like, void* stream, Allocator& allocator, MemoryLedger& ledger,
           const ExecutorLimits& limits, const Graph& base, std::size_t scratch_bytes)
    : Lane(own_context_, allocator, ledger, limits, base) {
  own_scratch_.emplace(allocator, ledger);
  own_scratch_->reserve(scratch_bytes);
  own_context_ = like;
  own_context_.stream = stream;
  own_context_.scratch = &*own_scratch_;
}

std::size_t Lane::indices_bytes(const ExecutorLimits& limits) {
  const auto bytes = static_cast<std::size_t>(std::max(limits.max_rows, limits.max_sampled_rows)) * 4;
  return kNumIndexArrays * aligned(bytes);
}

void Lane::reserve_workspace(std::size_t bytes) {
  const std::size_t before = workspace_.bytes();
  if (bytes <= before) return;
  workspace_.reset();
  try {
    workspace_ = Buffer(allocator_, ledger_, MemoryTag::kWorkspace, bytes);
  } catch (const OutOfMemory&) {
    if (before > 0) workspace_ = Buffer(allocator_, ledger_, MemoryTag::kWorkspace, before);  // serving goes on
    throw;
  }
}

TensorView Lane::index_array(IndexArray which, DType dtype, std::int64_t size) const {
  const std::size_t slot = indices_.bytes() / kNumIndexArrays;
  return indices_.view(dtype, {size}, static_cast<std::size_t>(which) * slot);
}

void Lane::clear_segments() {
  for (const auto site : sites_in_use_) segments_[static_cast<std::size_t>(site)].clear();
  sites_in_use_.clear();
  batch.sites = segments_;
  virtual_rows_.clear();
  batch.virtual_rows = virtual_rows_;
}

void Lane::add_segments(const Adapter& adapter, std::int64_t begin, std::int64_t end, float* gradients,
                        const SegmentDropout* dropout) {
  if (adapter.layout.num_virtual_tokens > 0) return;  // rows of their own
  for (const auto& module : adapter.layout.modules) {
    auto& segments = segments_[static_cast<std::size_t>(module.bypass.site)];
    if (segments.empty()) sites_in_use_.push_back(module.bypass.site);
    adapter.add_rows(module, begin, end, gradients, dropout, segments);
  }
}

void Lane::add_virtual_rows(const Adapter* adapter, std::int64_t position, std::int64_t begin, std::int64_t end,
                            float* gradients) {
  if (adapter == nullptr) return;
  if (const auto rows = adapter->virtual_rows(position, begin, end, gradients)) virtual_rows_.push_back(*rows);
  batch.virtual_rows = virtual_rows_;
}

void Lane::begin_output_rows() {
  output_segments_[static_cast<std::size_t>(output_site_)].clear();
  batch.sites = output_segments_;
  last_output_ = nullptr;
}

void Lane::add_output_rows(const Adapter& adapter, std::int64_t begin, std::int64_t end, float* gradients,
                           const SegmentDropout* dropout) {
  const AdapterModule* module = adapter.layout.find(output_site_);
  if (module == nullptr || begin == end) return;
  // Neighbours of one adapter are one segment, unless every sequence drops elements of its own.
  SiteSegments& site = output_segments_[static_cast<std::size_t>(output_site_)];
  const auto extends = [&](const auto& segments, const auto* gradient) {
    return dropout == nullptr && &adapter == last_output_ && !segments.empty() && segments.back().end == begin &&
           (gradient == nullptr) == (gradients == nullptr);
  };
  if (!site.lora.empty() && extends(site.lora, site.lora.back().grad_a))
    site.lora.back().end = end;
  else if (!site.own.empty() && extends(site.own, site.own.back().grad_weight))
    site.own.back().end = end;
  else
    adapter.add_rows(*module, begin, end, gradients, dropout, site);
  last_output_ = dropout == nullptr ? &adapter : nullptr;
}

void Lane::begin_fixed_segments(std::size_t count, std::int64_t num_rows) {
  require<Error>(count <= kMostFixedSegments, "lane: ", count, " adapters, wanted at most ", kMostFixedSegments);
  for (auto& segments : fixed_segments_) {
    if (count > 0) segments.lora.reserve(kMostFixedSegments);
    segments.lora.assign(count, {.begin = num_rows, .end = num_rows});
  }
  batch.sites = fixed_segments_;
  batch.virtual_rows = {};
}

void Lane::set_fixed_segments(std::size_t index, const Adapter& adapter, std::int64_t begin, std::int64_t end) {
  // Where an adapter has no module, its segment is empty, but still in order.
  for (auto& segments : fixed_segments_) segments.lora[index].begin = segments.lora[index].end = begin;
  for (const auto& module : adapter.layout.modules)
    fixed_segments_[static_cast<std::size_t>(module.bypass.site)].lora[index] =
        adapter.lora_segment(module, begin, end);
}

}  // namespace flexcore
