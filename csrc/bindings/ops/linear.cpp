#include "call.h"

namespace flexcore::python {
namespace {

using Object = nb::object;

void linear(const Object& x_, const Object& weight_, const Object& bias_, const Object& y_) {
  Call call("linear");
  const auto x = call.read(x_, "x"), weight = call.read(weight_, "weight"), bias = call.read_optional(bias_, "bias"),
             y = call.write(y_, "y");
  call.run([&](auto& runtime) { ops::linear(runtime, x, weight, bias, y); });
}

void linear_backward(const Object& grad_y_, const Object& weight_, const Object& grad_x_) {
  Call call("linear_backward");
  const auto grad_y = call.read(grad_y_, "grad_y"), weight = call.read(weight_, "weight"),
             grad_x = call.write(grad_x_, "grad_x");
  call.run([&](auto& runtime) { ops::linear_backward(runtime, grad_y, weight, grad_x); });
}

/// The arguments that both directions share; `scaling` is one number or a float32 array [num_adapters].
struct LoraArguments {
  LoraArguments(Call& call, const Object& x, const Object& weight, const Object& lora_a, const Object& lora_b,
                const Object& scaling_, const Object& indptr, const Object& adapter_ids) {
    layer.x = call.read(x, "x");
    layer.weight = call.read_optional(weight, "weight");
    layer.lora_a = call.read(lora_a, "lora_a");
    layer.lora_b = call.read(lora_b, "lora_b");
    if (PyFloat_Check(scaling_.ptr()) || PyLong_Check(scaling_.ptr())) {
      scaling = static_cast<float>(call.number(scaling_, "scaling"));
      layer.scaling = {&scaling, 1};
    } else {
      const TensorView values = call.read_on_host(scaling_, "scaling");
      if (values.ndim() != 1 || values.dtype() != DType::kFloat32 || !values.contiguous())
        call.refuse(scaling_, "scaling", "a number or contiguous float32 [num_adapters]");
      layer.scaling = {values.as<const float>(), static_cast<std::size_t>(values.shape(0))};
    }
    layer.indptr = call.read_on_host_optional(indptr, "indptr");
    layer.adapter_ids = call.read_on_host_optional(adapter_ids, "adapter_ids");
  }
  LoraArguments(const LoraArguments&) = delete;
  LoraArguments& operator=(const LoraArguments&) = delete;

  ops::LoraLayer layer;
  float scaling = 0;
};

void lora_forward(const Object& x, const Object& weight, const Object& lora_a, const Object& lora_b,
                  const Object& scaling, const Object& indptr, const Object& adapter_ids, const Object& y_) {
  Call call("lora_forward");
  const LoraArguments in(call, x, weight, lora_a, lora_b, scaling, indptr, adapter_ids);
  const auto y = call.write(y_, "y");
  call.run([&](auto& runtime) { ops::lora_forward(runtime, in.layer, y); });
}

void lora_backward(const Object& grad_y_, const Object& x, const Object& weight, const Object& lora_a,
                   const Object& lora_b, const Object& scaling, const Object& indptr, const Object& adapter_ids,
                   const Object& grad_x_, const Object& grad_a_, const Object& grad_b_) {
  Call call("lora_backward");
  const auto grad_y = call.read(grad_y_, "grad_y");
  const LoraArguments in(call, x, weight, lora_a, lora_b, scaling, indptr, adapter_ids);
  const auto grad_x = call.write(grad_x_, "grad_x"), grad_a = call.write(grad_a_, "grad_a"),
             grad_b = call.write(grad_b_, "grad_b");
  call.run([&](auto& runtime) { ops::lora_backward(runtime, in.layer, grad_y, grad_x, grad_a, grad_b); });
}

}  // namespace

void register_linear(nb::module_& m) {
  m.def("linear", &linear, "x"_object, "weight"_object, "bias"_object, "y"_object);
  m.def("linear_backward", &linear_backward, "grad_y"_object, "weight"_object, "grad_x"_object);
  m.def("lora_forward", &lora_forward, "x"_object, "weight"_object, "lora_a"_object, "lora_b"_object, "scaling"_object,
        "indptr"_object, "adapter_ids"_object, "y"_object);
  m.def("lora_backward", &lora_backward, "grad_y"_object, "x"_object, "weight"_object, "lora_a"_object, "lora_b"_object,
        "scaling"_object, "indptr"_object, "adapter_ids"_object, "grad_x"_object, "grad_a"_object, "grad_b"_object);
}

}  // namespace flexcore::python
