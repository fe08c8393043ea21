#include <limits>

#include "call.h"

namespace flexcore::python {
namespace {

using Object = nb::object;

void linear_cross_entropy(const Object& hidden_, const Object& weight_, const Object& labels_,
                          const Object& grad_scale_, const Object& loss_, const Object& grad_hidden_) {
  Call call("linear_cross_entropy");
  const auto hidden = call.read(hidden_, "hidden"), weight = call.read(weight_, "weight"),
             labels = call.read(labels_, "labels"), grad_scale = call.read_optional(grad_scale_, "grad_scale"),
             loss = call.write(loss_, "loss"), grad_hidden = call.write_optional(grad_hidden_, "grad_hidden");
  call.run([&](auto& runtime) {
    ops::linear_cross_entropy(runtime, hidden, weight, labels, grad_scale, loss, grad_hidden);
  });
}

void adamw(const Object& param_, const Object& grad_, const Object& exp_avg_, const Object& exp_avg_sq_,
           const Object& step, const Object& learning_rate, const Object& beta1, const Object& beta2, const Object& eps,
           const Object& weight_decay, const Object& grad_scale) {
  Call call("adamw");
  const auto param = call.write(param_, "param"), grad = call.read(grad_, "grad"),
             exp_avg = call.write(exp_avg_, "exp_avg"), exp_avg_sq = call.write(exp_avg_sq_, "exp_avg_sq");
  const ops::AdamW options{.step = call.integer(step, "step"),
                           .learning_rate = call.number(learning_rate, "learning_rate"),
                           .beta1 = call.number(beta1, "beta1"),
                           .beta2 = call.number(beta2, "beta2"),
                           .eps = call.number(eps, "eps"),
                           .weight_decay = call.number(weight_decay, "weight_decay"),
                           .grad_scale = call.number(grad_scale, "grad_scale")};
  call.run([&](auto& runtime) { ops::adamw(runtime, param, grad, exp_avg, exp_avg_sq, options); });
}

void sample(const Object& logits_, const Object& temperature, const Object& top_k_, const Object& top_p,
            const Object& min_p, const Object& seed, const Object& counter, const Object& tokens_,
            const Object& logprobs_) {
  Call call("sample");
  const auto logits = call.read(logits_, "logits");
  const auto top_k = call.integer(top_k_, "top_k");
  if (top_k < -1 || top_k > std::numeric_limits<std::int32_t>::max())
    call.refuse(top_k_, "top_k", "an int >= 1, or 0 or -1 for off");
  const ops::Sampling options{.temperature = static_cast<float>(call.number(temperature, "temperature")),
                              .top_k = static_cast<std::int32_t>(top_k),
                              .top_p = static_cast<float>(call.number(top_p, "top_p")),
                              .min_p = static_cast<float>(call.number(min_p, "min_p")),
                              .seed = call.unsigned_integer(seed, "seed"),
                              .counter = call.unsigned_integer(counter, "counter")};
  const auto tokens = call.write(tokens_, "tokens"), logprobs = call.write(logprobs_, "logprobs");
  call.run([&](auto& runtime) { ops::sample(runtime, logits, options, tokens, logprobs); });
}

}  // namespace

void register_training(nb::module_& m) {
  m.def("linear_cross_entropy", &linear_cross_entropy, "hidden"_object, "weight"_object, "labels"_object,
        "grad_scale"_object, "loss"_object, "grad_hidden"_object);
  m.def("adamw", &adamw, "param"_object, "grad"_object, "exp_avg"_object, "exp_avg_sq"_object, "step"_object,
        "learning_rate"_object, "beta1"_object, "beta2"_object, "eps"_object, "weight_decay"_object,
        "grad_scale"_object);
  m.def("sample", &sample, "logits"_object, "temperature"_object, "top_k"_object, "top_p"_object, "min_p"_object,
        "seed"_object, "counter"_object, "tokens"_object, "logprobs"_object);
}

}  // namespace flexcore::python
