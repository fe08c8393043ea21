#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>

namespace flexcore {

// Small dense least squares in fixed size, for the cost model.

template <std::size_t N>
using SquareMatrix = std::array<std::array<double, N>, N>;

template <std::size_t N>
void set_diagonal(SquareMatrix<N>& a, double value) {
  for (std::size_t i = 0; i < N; ++i) {
    a[i].fill(0.0);
    a[i][i] = value;
  }
}

/// a += weight * row^T row
template <std::size_t N>
void add_outer(SquareMatrix<N>& a, const std::array<double, N>& row, double weight) {
  for (std::size_t i = 0; i < N; ++i)
    for (std::size_t j = 0; j < N; ++j) a[i][j] += weight * row[i] * row[j];
}

template <std::size_t N>
double dot(const std::array<double, N>& x, const std::array<double, N>& y) {
  double sum = 0.0;
  for (std::size_t i = 0; i < N; ++i) sum += x[i] * y[i];
  return sum;
}

template <std::size_t N>
std::array<double, N> multiply(const SquareMatrix<N>& a, const std::array<double, N>& x) {
  std::array<double, N> y;
  for (std::size_t i = 0; i < N; ++i) y[i] = dot(a[i], x);
  return y;
}

/// Minimises x^T a x / 2 - b^T x over x >= 0 by coordinate descent from `x`; `a` is symmetric with a positive diagonal.
template <std::size_t N>
std::array<double, N> solve_non_negative(const SquareMatrix<N>& a, const std::array<double, N>& b,
                                         std::array<double, N> x, int max_sweeps) {
  for (double& value : x) value = std::max(0.0, value);
  for (int sweep = 0; sweep < max_sweeps; ++sweep) {
    double change = 0.0;
    for (std::size_t i = 0; i < N; ++i) {
      const double next = std::max(0.0, x[i] + (b[i] - dot(a[i], x)) / a[i][i]);
      change = std::max(change, std::abs(next - x[i]));
      x[i] = next;
    }
    if (change < 1e-10) break;
  }
  return x;
}

/// Inverse of a symmetric positive definite matrix by Gauss-Jordan elimination, which needs no pivots there.
template <std::size_t N>
SquareMatrix<N> inverse_spd(SquareMatrix<N> a) {
  SquareMatrix<N> inverse;
  set_diagonal(inverse, 1.0);
  for (std::size_t k = 0; k < N; ++k) {
    const double scale = 1.0 / a[k][k];
    for (std::size_t j = 0; j < N; ++j) {
      a[k][j] *= scale;
      inverse[k][j] *= scale;
    }
    for (std::size_t i = 0; i < N; ++i) {
      if (i == k) continue;
      const double factor = a[i][k];
      for (std::size_t j = 0; j < N; ++j) {
        a[i][j] -= factor * a[k][j];
        inverse[i][j] -= factor * inverse[k][j];
      }
    }
  }
  return inverse;
}

}  // namespace flexcore
