#include "ops/sampling.h"

#include <cmath>

#include "ops/require.h"

namespace flexcore {

namespace {

void require_tokens(std::size_t row, std::string_view name, std::span<const std::int32_t> tokens, std::int64_t vocab) {
  for (const auto token : tokens)
    require(0 <= token && token < vocab, SampleArgs::kName, ": row ", row, " ", name, " has token ", token,
            ", wanted in [0, ", vocab, ")");
}

void require_row(std::size_t i, const SamplingRow& row, const SamplingResult& result, std::int64_t vocab) {
  const auto wants = [&](bool good, std::string_view name, auto value, std::string_view wanted) {
    require(good, SampleArgs::kName, ": row ", i, " ", name, " is ", value, ", wanted ", wanted);
  };
  wants(row.temperature >= 0 && std::isfinite(row.temperature), "temperature", row.temperature, "finite and >= 0");
  wants(row.top_p > 0 && row.top_p <= 1, "top_p", row.top_p, "in (0, 1]");
  wants(row.min_p >= 0 && row.min_p <= 1, "min_p", row.min_p, "in [0, 1]");
  wants(row.top_k >= -1, "top_k", row.top_k, ">= 1, or 0 or -1 for off");
  wants(std::isfinite(row.presence_penalty), "presence_penalty", row.presence_penalty, "finite");
  wants(std::isfinite(row.frequency_penalty), "frequency_penalty", row.frequency_penalty, "finite");
  wants(row.repetition_penalty > 0 && std::isfinite(row.repetition_penalty), "repetition_penalty",
        row.repetition_penalty, "finite and > 0");
  wants(row.num_logprobs >= -1 && row.num_logprobs <= vocab, "num_logprobs", row.num_logprobs, "-1 to vocab_size");
  wants(static_cast<std::int64_t>(result.top.size()) >= row.num_logprobs, "results.top", result.top.size(),
        "room for num_logprobs");
  require_tokens(i, "forbidden", row.forbidden, vocab);
  for (const auto& [token, bias] : row.logit_bias) {
    wants(0 <= token && token < vocab, "logit_bias token", token, "in [0, vocab_size)");
    wants(!std::isnan(bias) && bias < HUGE_VALF, "logit_bias", bias, "a number below infinity");
  }
  const bool repetition = row.repetition_penalty != 1.0f;
  if (repetition) require_tokens(i, "prompt", row.prompt, vocab);
  if (repetition || row.presence_penalty != 0 || row.frequency_penalty != 0)
    require_tokens(i, "generated", row.generated, vocab);
}

}  // namespace

void check(const SampleArgs& args) {
  constexpr auto op = SampleArgs::kName;
  require_matrix(op, "logits", args.logits);
  require_dtype(op, "logits", args.logits, DType::kFloat32);
  const auto rows = static_cast<std::size_t>(args.logits.shape(0));
  require(args.rows.size() == rows, op, ": ", args.rows.size(), " rows, wanted ", rows, " like logits");
  require(args.results.size() == rows, op, ": ", args.results.size(), " results, wanted ", rows, " like logits");
  require(rows == 0 || args.logits.shape(1) > 0, op, ": logits is ", args.logits, ", wanted tokens");
  for (std::size_t i = 0; i < rows; ++i) require_row(i, args.rows[i], args.results[i], args.logits.shape(1));
}

}  // namespace flexcore
