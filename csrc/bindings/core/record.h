#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "convert.h"
#include "flexcore/error.h"

namespace flexcore::python {

/// Binds a plain struct as a Python class: keyword (or positional) constructor with the struct's own defaults, checked
/// mutable properties, repr, equality, copy and pickle. The class attribute `_fields` lists the fields in order.
template <class T>
class Record {
 public:
  using Get = std::function<py::object(const T&)>;
  using Set = std::function<void(T&, py::handle, const std::string& where)>;

  Record(py::module_& m, const char* name, const char* doc) : cls_(m, name, doc), fields_(std::make_shared<Fields>()) {
    fields_->name = name;
  }

  template <class M, class C>
  Record& field(const char* name, M C::* member) {
    return property(
        name, [member](const T& self) { return to_python(self.*member); },
        [member](T& self, py::handle value, const std::string& where) { self.*member = convert<M>(value, where); });
  }

  Record& property(const char* name, Get get, Set set) {
    cls_.def_property(name, get, [where = fields_->name + "." + name, set](T& self, const py::object& value) {
      set(self, value, where);
    });
    fields_->all.push_back({name, std::move(get), std::move(set)});
    return *this;
  }

  /// A field that is a record itself: changes through it change this one.
  template <class M>
  Record& nested(const char* name, M T::* member) {
    field(name, member);
    const std::string where = fields_->name + "." + name;
    cls_.def_property(
        name, [member](T& self) -> M& { return self.*member; },
        [member, where](T& self, const py::object& value) { self.*member = convert<M>(value, where); });
    return *this;
  }

  py::class_<T> done() {
    cls_.def(py::init(
        [fields = fields_](const py::args& args, const py::kwargs& kwargs) { return fields->make(args, kwargs); }));
    cls_.def("__repr__", [fields = fields_](const T& self) { return fields->repr(self); });
    cls_.def("__eq__", [fields = fields_](const T& self, const py::object& other) -> py::object {
      if (!py::isinstance<T>(other)) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
      return py::bool_(fields->dict(self).equal(fields->dict(other.cast<const T&>())));
    });
    cls_.def(
        py::pickle([fields = fields_](const T& self) { return fields->dict(self); },
                   [fields = fields_](const py::dict& state) { return fields->make(py::tuple(), py::kwargs(state)); }));
    py::tuple names(fields_->all.size());
    for (std::size_t i = 0; i < fields_->all.size(); ++i) names[i] = py::str(fields_->all[i].name);
    cls_.attr("_fields") = names;
    cls_.attr("__hash__") = py::none();  // mutable
    return cls_;
  }

 private:
  struct Field {
    std::string name;
    Get get;
    Set set;
  };

  struct Fields {
    std::string name;
    std::vector<Field> all;

    T make(const py::tuple& args, const py::dict& kwargs) const {
      T out{};
      if (args.size() > all.size())
        throw py::type_error(name + "() takes at most " + std::to_string(all.size()) + " arguments");
      for (std::size_t i = 0; i < args.size(); ++i) {
        if (kwargs.contains(all[i].name)) throw py::type_error(name + "() got " + all[i].name + " twice");
        all[i].set(out, args[i], name + "." + all[i].name);
      }
      for (const auto& [key, value] : kwargs)
        find(key.template cast<std::string>()).set(out, value, name + "." + key.template cast<std::string>());
      return out;
    }

    const Field& find(const std::string& key) const {
      std::string known;
      for (const Field& field : all) {
        if (field.name == key) return field;
        known += (known.empty() ? "" : ", ") + field.name;
      }
      throw py::type_error(name + "() has no field '" + key + "'; it has " + known);
    }

    std::string repr(const T& self) const {
      std::string out;
      for (const Field& field : all)
        out += (out.empty() ? "" : ", ") + field.name + "=" + py::repr(field.get(self)).template cast<std::string>();
      return name + "(" + out + ")";
    }

    py::dict dict(const T& self) const {
      py::dict out;
      for (const Field& field : all) out[py::str(field.name)] = field.get(self);
      return out;
    }
  };

  py::class_<T> cls_;
  std::shared_ptr<Fields> fields_;
};

/// Binds a struct that only the library makes: read-only attributes and a repr.
template <class T>
class Report {
 public:
  Report(py::module_& m, const char* name, const char* doc) : cls_(m, name, doc), name_(name) {}

  template <class M>
  Report& field(const char* name, M T::* member) {
    return property(name, [member](const T& self) { return py::cast(self.*member); });
  }

  Report& property(const char* name, std::function<py::object(const T&)> get) {
    cls_.def_property_readonly(name, get);
    fields_.emplace_back(name, std::move(get));
    return *this;
  }

  py::class_<T> done() {
    py::tuple names(fields_.size());
    for (std::size_t i = 0; i < fields_.size(); ++i) names[i] = py::str(fields_[i].first);
    cls_.attr("_fields") = names;
    cls_.def("__repr__", [name = name_, fields = fields_](const T& self) {
      std::string out;
      for (const auto& [field, get] : fields)
        out += (out.empty() ? "" : ", ") + field + "=" + py::repr(get(self)).template cast<std::string>();
      return name + "(" + out + ")";
    });
    return cls_;
  }

 private:
  py::class_<T> cls_;
  std::string name_;
  std::vector<std::pair<std::string, std::function<py::object(const T&)>>> fields_;
};

}  // namespace flexcore::python
