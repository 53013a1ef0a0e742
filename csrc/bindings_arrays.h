// Arrays of Python, checked: dtype, shape and contiguity, or ValueError.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "decoder.h"

namespace tritkit {

namespace nb = nanobind;
using namespace nb::literals;

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using OptionalArray = std::optional<Array>;
using Release = nb::call_guard<nb::gil_scoped_release>;

inline std::string shape_of(const Array& a) {
    std::string text = "[";
    for (size_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
    return text + "]";
}

inline bool is_contiguous(const Array& a) {
    int64_t expected = 1;
    for (size_t i = a.ndim(); i-- > 0;) {
        if (a.size() && a.shape(i) != 1 && a.stride(i) != expected) return false;
        expected *= static_cast<int64_t>(a.shape(i));
    }
    return true;
}

inline std::string dtype_name(nb::dlpack::dtype type) {
    const char* kinds[] = {"int", "uint", "float"};
    return (type.code < 3 ? kinds[type.code] : "another kind of ") + std::to_string(type.bits);
}

/// The data of a contiguous array of this rank.
inline const void* checked_data(const Array& a, const char* name, size_t rank) {
    const std::string what(name);
    if (a.ndim() != rank)
        throw nb::value_error(
            (what + " has shape " + shape_of(a) + ", expected " + std::to_string(rank) + " dimensions").c_str());
    if (!is_contiguous(a)) throw nb::value_error((what + " must be C-contiguous").c_str());
    return a.data();
}

inline const void* checked_data(const Array& a, const char* name, std::initializer_list<int64_t> shape) {
    const void* data = checked_data(a, name, shape.size());
    size_t i = 0;
    std::string expected;
    bool good = true;
    for (int64_t n : shape) {
        good = good && static_cast<int64_t>(a.shape(i++)) == n;
        expected += (expected.empty() ? "" : ", ") + std::to_string(n);
    }
    if (!good)
        throw nb::value_error(
            (std::string(name) + " has shape " + shape_of(a) + ", expected [" + expected + "]").c_str());
    return data;
}

/// The same for elements of T; `shape` is the rank or all dimensions.
template <class T, class Shape = std::initializer_list<int64_t>>
const T* checked(const Array& a, const char* name, Shape shape) {
    if (a.dtype() != nb::dtype<T>())
        throw nb::value_error(
            (std::string(name) + " is " + dtype_name(a.dtype()) + ", expected " + dtype_name(nb::dtype<T>())).c_str());
    return static_cast<const T*>(checked_data(a, name, shape));
}

template <class T>
nb::object new_array(T*& data, std::initializer_list<size_t> shape) {
    size_t size = 1;
    for (size_t n : shape) size *= n;
    data = new T[size]();
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T>(data, shape, owner));
}

/// The bytes of an array and what keeps them alive, for objects that read them where they lie.
inline Bytes bytes_of(const Array& a) {
    std::shared_ptr<const void> owner(new Array(a), [](const Array* array) {
        nb::gil_scoped_acquire acquire;
        delete array;
    });
    return Bytes(std::move(owner), static_cast<const uint8_t*>(a.data()), a.nbytes());
}

/// float16 as its bits.
inline const uint16_t* checked_halves(const Array& a, const char* name, std::initializer_list<int64_t> shape) {
    if (a.dtype() != nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1})
        throw nb::value_error((std::string(name) + " is " + dtype_name(a.dtype()) + ", expected float16").c_str());
    return static_cast<const uint16_t*>(checked_data(a, name, shape));
}

inline const void* checked_floats(const Array& a, const char* name, std::initializer_list<int64_t> shape, bool& half) {
    half = a.dtype().bits == 16;
    return half ? static_cast<const void*>(checked_halves(a, name, shape)) : checked<float>(a, name, shape);
}

template <class Matrix>
void require_shape(const Matrix& linear, const char* name, int rows, int columns) {
    if (linear.rows() != rows || linear.columns() != columns)
        throw nb::value_error((std::string(name) + " has shape [" + std::to_string(linear.rows()) + ", " +
                               std::to_string(linear.columns()) + "], expected [" + std::to_string(rows) + ", " +
                               std::to_string(columns) + "]")
                                  .c_str());
}

inline Norm norm(const std::optional<Array>& a, const char* name, int size) {
    if (!a) return {};
    const float* data = checked<float>(*a, name, {size});
    return Norm(data, data + size);
}

}  // namespace tritkit
