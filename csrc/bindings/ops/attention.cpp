#include "call.h"

namespace flexcore::python {
namespace {

using Object = nb::object;

void kv_write(const Object& k_, const Object& v_, const Object& k_pages, const Object& v_pages,
              const Object& block_tables, const Object& indptr, const Object& positions) {
  Call call("kv_write");
  const auto k = call.read(k_, "k"), v = call.read(v_, "v");
  const ops::PagedKv kv{call.write(k_pages, "k_pages"), call.write(v_pages, "v_pages"),
                        call.read_on_host(block_tables, "block_tables"), call.read_on_host(indptr, "indptr"),
                        call.read_on_host(positions, "positions")};
  call.run([&](auto& runtime) { ops::kv_write(runtime, k, v, kv); });
}

void attention(const Object& q_, const Object& k_pages, const Object& v_pages, const Object& block_tables,
               const Object& indptr, const Object& positions, const Object& scale_, const Object& sliding_window_,
               const Object& y_, const Object& lse_) {
  Call call("attention");
  const auto q = call.read(q_, "q");
  const ops::PagedKv kv{call.read(k_pages, "k_pages"), call.read(v_pages, "v_pages"),
                        call.read_on_host(block_tables, "block_tables"), call.read_on_host(indptr, "indptr"),
                        call.read_on_host(positions, "positions")};
  const auto scale = static_cast<float>(call.number(scale_, "scale"));
  const auto sliding_window = call.integer(sliding_window_, "sliding_window");
  const auto y = call.write(y_, "y"), lse = call.write(lse_, "lse");
  call.run([&](auto& runtime) { ops::attention(runtime, q, kv, y, lse, scale, sliding_window); });
}

void attention_backward_window(const Object& grad_y, const Object& q, const Object& y, const Object& lse,
                               const Object& k_pages, const Object& v_pages, const Object& block_table,
                               const Object& position, const Object& grad_k_, const Object& grad_v_,
                               const Object& scale, const Object& sliding_window, const Object& grad_q_,
                               const Object& grad_k_rows_, const Object& grad_v_rows_) {
  Call call("attention_backward_window");
  const ops::AttentionWindow window{.grad_y = call.read(grad_y, "grad_y"),
                                    .q = call.read(q, "q"),
                                    .y = call.read(y, "y"),
                                    .lse = call.read(lse, "lse"),
                                    .k_pages = call.read(k_pages, "k_pages"),
                                    .v_pages = call.read(v_pages, "v_pages"),
                                    .block_table = call.read_on_host(block_table, "block_table"),
                                    .position = call.integer(position, "position"),
                                    .scale = static_cast<float>(call.number(scale, "scale")),
                                    .sliding_window = call.integer(sliding_window, "sliding_window")};
  const auto grad_k = call.write(grad_k_, "grad_k"), grad_v = call.write(grad_v_, "grad_v"),
             grad_q = call.write(grad_q_, "grad_q"), grad_k_rows = call.write(grad_k_rows_, "grad_k_rows"),
             grad_v_rows = call.write(grad_v_rows_, "grad_v_rows");
  call.run([&](auto& runtime) {
    ops::attention_backward_window(runtime, window, grad_k, grad_v, grad_q, grad_k_rows, grad_v_rows);
  });
}

}  // namespace

void register_attention(nb::module_& m) {
  m.def("kv_write", &kv_write, "k"_object, "v"_object, "k_pages"_object, "v_pages"_object, "block_tables"_object,
        "indptr"_object, "positions"_object);
  m.def("attention", &attention, "q"_object, "k_pages"_object, "v_pages"_object, "block_tables"_object, "indptr"_object,
        "positions"_object, "scale"_object, "sliding_window"_object, "y"_object, "lse"_object);
  m.def("attention_backward_window", &attention_backward_window, "grad_y"_object, "q"_object, "y"_object, "lse"_object,
        "k_pages"_object, "v_pages"_object, "block_table"_object, "position"_object, "grad_k"_object, "grad_v"_object,
        "scale"_object, "sliding_window"_object, "grad_q"_object, "grad_k_rows"_object, "grad_v_rows"_object);
}

}  // namespace flexcore::python
