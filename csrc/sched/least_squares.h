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

/// Solves a x = b over the chosen rows and columns, x = 0 elsewhere; `a` is symmetric positive definite.
template <std::size_t N>
std::array<double, N> solve_chosen(SquareMatrix<N> a, std::array<double, N> b, const std::array<bool, N>& chosen) {
  std::array<double, N> x{};
  for (std::size_t k = 0; k < N; ++k) {
    if (!chosen[k]) continue;
    for (std::size_t i = k + 1; i < N; ++i) {
      if (!chosen[i]) continue;
      const double factor = a[i][k] / a[k][k];
      for (std::size_t j = k; j < N; ++j) a[i][j] -= factor * a[k][j];
      b[i] -= factor * b[k];
    }
  }
  for (std::size_t k = N; k-- > 0;)
    if (chosen[k]) x[k] = (b[k] - dot(a[k], x)) / a[k][k];  // x[k] and what is left of it are still 0
  return x;
}

/// Minimises x^T a x / 2 - b^T x over x >= 0 by the active-set method of Lawson and Hanson; `a` is symmetric positive
/// definite.
template <std::size_t N>
std::array<double, N> solve_non_negative(const SquareMatrix<N>& a, const std::array<double, N>& b) {
  std::array<double, N> x{};
  std::array<bool, N> positive{};
  const double tolerance = 1e-12 * std::sqrt(dot(b, b));
  for (std::size_t round = 0; round < 3 * N; ++round) {
    const auto product = multiply(a, x);
    std::size_t best = N;
    double slope = tolerance;
    for (std::size_t i = 0; i < N; ++i)
      if (!positive[i] && b[i] - product[i] > slope) slope = b[i] - product[best = i];
    if (best == N) break;
    positive[best] = true;
    for (std::size_t drop = 0; drop < N; ++drop) {
      const auto target = solve_chosen(a, b, positive);
      double step = 1.0;
      for (std::size_t i = 0; i < N; ++i)
        if (positive[i] && target[i] <= 0.0) step = std::min(step, x[i] / (x[i] - target[i]));
      for (std::size_t i = 0; i < N; ++i) {
        x[i] += step * (target[i] - x[i]);
        if (positive[i] && (x[i] <= 0.0 || (target[i] <= 0.0 && x[i] < 1e-14))) {
          positive[i] = false;
          x[i] = 0.0;
        }
      }
      if (step == 1.0) break;
    }
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
