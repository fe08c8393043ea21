#include <limits>
#include <vector>

#include "engine/array_ops.h"
#include "ops/linear.h"
#include "ops/lora.h"
#include "ops/scatter.h"

namespace flexcore::ops {

WeightView plain_weight(std::string_view op, const TensorView& weight) {
  require_matrix(op, "weight", weight);
  require_contiguous(op, "weight", weight);
  return {weight.data(), weight.dtype(), weight.shape(0), weight.shape(1), false};
}

std::span<const std::int32_t> require_indptr(std::string_view op, const TensorView& indptr, std::int64_t num_tokens) {
  const std::int64_t size = indptr.ndim() == 1 ? indptr.shape(0) : 0;
  require_vector(op, "indptr", indptr, size, DType::kInt32);
  require(size >= 1, op, ": indptr is ", indptr, ", wanted [num_segments + 1]");
  const std::span offsets(indptr.as<const std::int32_t>(), static_cast<std::size_t>(size));
  for (std::size_t i = 1; i < offsets.size(); ++i)
    require(offsets[i - 1] <= offsets[i], op, ": indptr falls from ", offsets[i - 1], " to ", offsets[i], " at ", i,
            ", wanted ascending");
  require(offsets.front() == 0 && offsets.back() == num_tokens, op, ": indptr goes from ", offsets.front(), " to ",
          offsets.back(), ", wanted from 0 to ", num_tokens);
  return offsets;
}

void linear(Runtime& runtime, const TensorView& x, const TensorView& weight, const TensorView& bias,
            const TensorView& y) {
  constexpr auto op = LinearArgs::kName;
  require_matrix(op, "x", x);
  const LinearArgs::Member member{plain_weight(op, weight), bias, y, GradMode::kWrite};
  if (given(bias)) require_vector(op, "bias", bias, weight.shape(0));
  run_op(runtime, LinearArgs{x, {&member, 1}});
}

void linear_backward(Runtime& runtime, const TensorView& grad_y, const TensorView& weight, const TensorView& grad_x) {
  constexpr auto op = LinearBackwardArgs::kName;
  require_matrix(op, "grad_y", grad_y);
  const LinearBackwardArgs::Member member{plain_weight(op, weight), grad_y};
  require_matrix(op, "grad_y", grad_y, grad_y.shape(0), weight.shape(0));
  run_op(runtime, LinearBackwardArgs{{&member, 1}, grad_x, GradMode::kWrite});
}

namespace {

/// The adapters' matrices as one stack.
struct AdapterStack {
  std::int64_t count = 1, rank = 0, in_features = 0, out_features = 0;
  std::int64_t a_size() const { return rank * in_features; }
  std::int64_t b_size() const { return out_features * rank; }
};

AdapterStack check_adapters(std::string_view op, const LoraLayer& layer) {
  require_matrix(op, "x", layer.x);
  const auto &a = layer.lora_a, &b = layer.lora_b;
  const int stacked = a.ndim() == 3 ? 1 : 0;
  require(a.ndim() == 2 || stacked == 1, op, ": lora_a is ", a,
          ", wanted [rank, in_features] or [num_adapters, rank, in_features]");
  require(b.ndim() == a.ndim(), op, ": lora_b is ", b, ", lora_a is ", a, ", wanted as many dimensions");
  const AdapterStack s{stacked ? a.shape(0) : 1, a.shape(stacked), layer.x.shape(1), b.shape(stacked)};
  if (stacked) {
    require_shape(op, "lora_a", a, {s.count, s.rank, s.in_features});
    require_shape(op, "lora_b", b, {s.count, s.out_features, s.rank});
  } else {
    require_shape(op, "lora_a", a, {s.rank, s.in_features});
    require_shape(op, "lora_b", b, {s.out_features, s.rank});
  }
  for (const auto& [name, matrix] : {std::pair{"lora_a", &a}, std::pair{"lora_b", &b}}) {
    require_dtype(op, name, *matrix, DType::kFloat32);
    require_contiguous(op, name, *matrix);
  }
  const auto scalings = static_cast<std::int64_t>(layer.scaling.size());
  require(scalings == 1 || scalings == s.count, op, ": scaling has ", scalings, " values, wanted 1 or ", s.count);
  if (given(layer.weight)) {
    plain_weight(op, layer.weight);
    require_shape(op, "weight", layer.weight, {s.out_features, s.in_features});
  }
  return s;
}

std::vector<LoraSegment> make_segments(std::string_view op, const LoraLayer& layer, const AdapterStack& stack) {
  require(layer.x.shape(0) <= std::numeric_limits<std::int32_t>::max(), op, ": x is ", layer.x, ", wanted fewer rows");
  const std::int32_t whole[] = {0, static_cast<std::int32_t>(layer.x.shape(0))};
  std::span<const std::int32_t> offsets = whole;
  if (given(layer.indptr)) offsets = require_indptr(op, layer.indptr, layer.x.shape(0));
  const auto num_segments = static_cast<std::int64_t>(offsets.size()) - 1;
  if (given(layer.adapter_ids)) {
    require(given(layer.indptr), op, ": adapter_ids is ", layer.adapter_ids, " without indptr");
    require_vector(op, "adapter_ids", layer.adapter_ids, num_segments, DType::kInt32);
  } else {
    require(num_segments == stack.count, op, ": ", num_segments, " segments of indptr for ", stack.count,
            " adapters, wanted as many, or adapter_ids");
  }
  std::vector<LoraSegment> segments;
  for (std::int64_t i = 0; i < num_segments; ++i) {
    const std::int64_t adapter = given(layer.adapter_ids) ? layer.adapter_ids.as<const std::int32_t>()[i] : i;
    require(-1 <= adapter && adapter < stack.count, op, ": adapter_ids[", i, "] is ", adapter, ", wanted in [-1, ",
            stack.count, ")");
    if (adapter < 0) continue;
    segments.push_back({.begin = offsets[i],
                        .end = offsets[i + 1],
                        .lora_a = layer.lora_a.as<const float>() + adapter * stack.a_size(),
                        .lora_b = layer.lora_b.as<const float>() + adapter * stack.b_size(),
                        .rank = stack.rank,
                        .scaling = layer.scaling[layer.scaling.size() == 1 ? 0 : adapter]});
  }
  return segments;
}

}  // namespace

void lora_forward(Runtime& runtime, const LoraLayer& layer, const TensorView& y) {
  constexpr auto op = LoraArgs::kName;
  const AdapterStack stack = check_adapters(op, layer);
  const auto segments = make_segments(op, layer, stack);
  require_matrix(op, "y", y, layer.x.shape(0), stack.out_features);
  const LoraArgs::Member member{y, segments};
  const LoraArgs args{layer.x, {&member, 1}};
  check(args);
  if (given(layer.weight))
    linear(runtime, layer.x, layer.weight, {}, y);
  else
    run_op(runtime, ZeroArgs{y});
  run_op(runtime, args);
}

void lora_backward(Runtime& runtime, const LoraLayer& layer, const TensorView& grad_y, const TensorView& grad_x,
                   const TensorView& grad_a, const TensorView& grad_b) {
  constexpr auto op = LoraBackwardArgs::kName;
  const AdapterStack stack = check_adapters(op, layer);
  auto segments = make_segments(op, layer, stack);
  require_matrix(op, "grad_y", grad_y, layer.x.shape(0), stack.out_features);
  for (const auto& [name, gradient, parameter] :
       {std::tuple{"grad_a", &grad_a, &layer.lora_a}, std::tuple{"grad_b", &grad_b, &layer.lora_b}}) {
    require_dtype(op, name, *gradient, DType::kFloat32);
    require_contiguous(op, name, *gradient);
    require_like(op, name, *gradient, std::string_view(name) == "grad_a" ? "lora_a" : "lora_b", *parameter);
  }
  for (auto& segment : segments) {  // the gradients lie as the parameters do
    segment.grad_a = grad_a.as<float>() + (segment.lora_a - layer.lora_a.as<const float>());
    segment.grad_b = grad_b.as<float>() + (segment.lora_b - layer.lora_b.as<const float>());
  }
  const LoraBackwardArgs::Member member{grad_y, segments};
  const LoraBackwardArgs args{layer.x, {&member, 1}, grad_x};
  check(args);
  if (given(layer.weight))
    linear_backward(runtime, grad_y, layer.weight, grad_x);
  else
    run_op(runtime, ZeroArgs{grad_x});
  run_op(runtime, args);
}

}  // namespace flexcore::ops
