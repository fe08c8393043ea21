#include "call.h"

namespace flexcore::python {
namespace {

using Object = nb::object;

void rms_norm(const Object& x_, const Object& weight_, const Object& eps_, const Object& y_) {
  Call call("rms_norm");
  const auto x = call.read(x_, "x"), weight = call.read(weight_, "weight");
  const auto eps = static_cast<float>(call.number(eps_, "eps"));
  const auto y = call.write(y_, "y");
  call.run([&](auto& runtime) { ops::rms_norm(runtime, x, weight, y, eps); });
}

void rms_norm_backward(const Object& grad_y_, const Object& x_, const Object& weight_, const Object& eps_,
                       const Object& grad_x_) {
  Call call("rms_norm_backward");
  const auto grad_y = call.read(grad_y_, "grad_y"), x = call.read(x_, "x"), weight = call.read(weight_, "weight");
  const auto eps = static_cast<float>(call.number(eps_, "eps"));
  const auto grad_x = call.write(grad_x_, "grad_x");
  call.run([&](auto& runtime) { ops::rms_norm_backward(runtime, grad_y, x, weight, grad_x, eps); });
}

void rotary(const Object& x_, const Object& positions_, const Object& cos_, const Object& sin_, const Object& inverse_,
            const Object& y_) {
  Call call("rotary");
  const auto x = call.read(x_, "x"), positions = call.read(positions_, "positions"), cos = call.read(cos_, "cos"),
             sin = call.read(sin_, "sin");
  const bool inverse = call.integer(inverse_, "inverse") != 0;
  const auto y = call.write(y_, "y");
  call.run([&](auto& runtime) { ops::rotary(runtime, x, positions, cos, sin, y, inverse); });
}

void silu_mul(const Object& gate_, const Object& up_, const Object& y_) {
  Call call("silu_mul");
  const auto gate = call.read(gate_, "gate"), up = call.read(up_, "up"), y = call.write(y_, "y");
  call.run([&](auto& runtime) { ops::silu_mul(runtime, gate, up, y); });
}

void silu_mul_backward(const Object& grad_y_, const Object& gate_, const Object& up_, const Object& grad_gate_,
                       const Object& grad_up_) {
  Call call("silu_mul_backward");
  const auto grad_y = call.read(grad_y_, "grad_y"), gate = call.read(gate_, "gate"), up = call.read(up_, "up"),
             grad_gate = call.write_optional(grad_gate_, "grad_gate"),
             grad_up = call.write_optional(grad_up_, "grad_up");
  call.run([&](auto& runtime) { ops::silu_mul_backward(runtime, grad_y, gate, up, grad_gate, grad_up); });
}

}  // namespace

void register_elementwise(nb::module_& m) {
  m.def("rms_norm", &rms_norm, "x"_object, "weight"_object, "eps"_object, "y"_object);
  m.def("rms_norm_backward", &rms_norm_backward, "grad_y"_object, "x"_object, "weight"_object, "eps"_object,
        "grad_x"_object);
  m.def("rotary", &rotary, "x"_object, "positions"_object, "cos"_object, "sin"_object, "inverse"_object, "y"_object);
  m.def("silu_mul", &silu_mul, "gate"_object, "up"_object, "y"_object);
  m.def("silu_mul_backward", &silu_mul_backward, "grad_y"_object, "gate"_object, "up"_object, "grad_gate"_object,
        "grad_up"_object);
}

}  // namespace flexcore::python
