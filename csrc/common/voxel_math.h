// The maths of one voxel and one class, written once for scalars and vectors, host and device.
// T is any type with arithmetic and comparison operators; whoever includes this defines DK_ISA and
// declares select(mask, a, b), exp, log, reciprocal and log1p of T, and splat from a number to T,
// in namespace dicekernels::DK_ISA before.
// p: probability, g: target, z: logit. Formulas: docs/semantics.md.
#pragma once
#include <type_traits>

#include "problem.h"

namespace dicekernels {
namespace DK_ISA {

template <class T>
struct OverlapTerms {
  T tp, fp, fn;
};

template <class T>
DK_INLINE T magnitude(T x) {
  return select(x < T{} + 0, -x, x);
}
template <class T>
DK_INLINE T signum(T x) {
  const T zero = T{} + 0;
  return select(x > zero, zero + 1, select(x < zero, zero - 1, x));  // x itself keeps 0 and NaN
}

template <Overlap O, class T>
DK_INLINE OverlapTerms<T> overlap_terms(T p, T g) {
  if constexpr (O == Overlap::product) {
    return {p * g, p * (1 - g), (1 - p) * g};
  } else if constexpr (O == Overlap::squared) {
    return {p * g, p * (p - g), g * (g - p)};
  } else if constexpr (O == Overlap::voxel_squared) {
    return {p * p * g, p * p * (1 - g), (1 - p) * (1 - p) * g};
  } else {
    // (|p| + |g| - |p - g|) / 2 without its rounding: the smaller one where the signs agree, else
    // 0.
    const T zero = T{} + 0, ap = magnitude(p), ag = magnitude(g);
    const T smaller = select(ap < ag, ap, ag);
    const T tp = select(p * g > zero, smaller, p * g != p * g ? p * g : zero);
    return {tp, ap - tp, ag - tp};
  }
}

// d(aI tp + aFP fp + aFN fn)/dp
template <Overlap O, class T, class S>
DK_INLINE T overlap_slope(T p, T g, S a_i, S a_fp, S a_fn) {
  if constexpr (O == Overlap::product) {
    return (a_i - a_fn) * g + a_fp * (1 - g);
  } else if constexpr (O == Overlap::squared) {
    return (a_i - a_fn) * g + a_fp * (2 * p - g);
  } else if constexpr (O == Overlap::voxel_squared) {
    return 2 * (a_i * p * g + a_fp * p * (1 - g) - a_fn * (1 - p) * g);
  } else {
    // The subgradients of torch: sign(0) = 0 in both absolute values.
    const T sp = signum(p), d = (sp - signum(p - g)) / 2;
    return (a_i - a_fn - a_fp) * d + a_fp * sp;
  }
}

// What the voxel terms need of one logit; e = exp(-|z|) is the only transcendental but log1p(e).
template <class T>
struct Sigmoid {
  T p, q;               // sigmoid(z) and 1 - sigmoid(z), each with full relative accuracy
  T softplus, softneg;  // log(1 + exp(z)) = -log(q), log(1 + exp(-z)) = -log(p)
};

template <bool Logs, class T>
DK_INLINE Sigmoid<T> sigmoid(T z) {
  const T zero = T{} + 0;
  const auto positive = z >= zero;
  const T e = exp(-magnitude(z)), large = reciprocal(1 + e), small = e * large;
  Sigmoid<T> s{select(positive, large, small), select(positive, small, large), zero, zero};
  if constexpr (Logs) {
    const T l = log1p(e);
    s.softplus = select(positive, z + l, l);
    s.softneg = select(positive, l, l - z);
  }
  return s;
}

template <class T>
struct Term {
  T loss, slope;
};

// MONAI's sigmoid focal loss exp(gamma logsigmoid(a)) * bce(z, g) with a = -z (2g - 1), and its
// derivative in z.
template <class T, class S>
DK_INLINE Term<T> sigmoid_focal(T z, T g, S gamma) {
  const Sigmoid<T> s = sigmoid<true>(z);
  const T sign = 2 * g - 1;
  const Sigmoid<T> a = sigmoid<true>(-z * sign);
  const T modulation = gamma == 0 ? T{} + 1 : exp(-gamma * a.softneg);
  const T bce = z * (1 - g) + s.softneg;
  return {modulation * bce, modulation * (s.p - g - gamma * sign * a.q * bce)};
}

// The same for a target of 0 or 1, where s = z (2g - 1) tells all: q^gamma (-log p) with p =
// sigmoid(s) and q = 1 - p, and its derivative in s.
template <class T, class S>
DK_INLINE Term<T> hard_focal(T s, S gamma) {
  const Sigmoid<T> a = sigmoid<true>(s);
  const T one = T{} + 1;
  const T modulation = gamma == 2 ? a.q * a.q : gamma == 0 ? one : exp(-gamma * a.softplus);
  return {modulation * a.softneg, -modulation * (gamma * a.p * a.softneg + a.q)};
}

// (1 - p)^gamma (-log p) and p * d/dp of it, from log p <= 0.
template <class T, class S>
DK_INLINE Term<T> softmax_focal(T log_p, S gamma) {
  const T zero = T{} + 0, p = exp(log_p), rest = 1 - p;
  if (gamma == 0) return {-log_p, zero - 1};
  const auto certain = rest <= zero;
  const T power = gamma == 2 ? rest * rest : exp(gamma * log(select(certain, zero + 1, rest)));
  const T loss = select(certain, zero, -power * log_p);
  const T slope = power * (gamma * p * log_p / select(certain, zero + 1, rest) - 1);
  return {loss, select(certain, zero, slope)};
}

// What a problem says of its voxel term.
template <class S>
struct TermNumbers {
  VoxelTerm term;
  S gamma;
  DK_INLINE explicit TermNumbers(const Problem& problem)
      : term(problem.voxel_term), gamma(static_cast<S>(problem.focal_gamma)) {}
};

// The terms but the cross entropy, which is fused with the softmax of the overlap, are of two
// families. A new one is a number in problem.h and a case in the functions of its family.

// Softmax terms: of log p over the classes from first_class on. The loss of a voxel of this class,
// and p * d loss/dp.
DK_INLINE constexpr bool is_softmax_term(VoxelTerm term) {
  return term == VoxelTerm::focal_softmax;
}
template <class T, class S>
DK_INLINE Term<T> softmax_term(const TermNumbers<S>& n, T log_p) {
  return softmax_focal(log_p, n.gamma);
}

// Binary terms: of z and g of each class by itself. Calls f with one as a compile-time constant.
template <class F>
DK_INLINE void with_binary_term(VoxelTerm term, F f) {
  if (term == VoxelTerm::bce) f(std::integral_constant<VoxelTerm, VoxelTerm::bce>{});
  if (term == VoxelTerm::focal_sigmoid)
    f(std::integral_constant<VoxelTerm, VoxelTerm::focal_sigmoid>{});
}

// Adds m times the loss to the rows POS and NEG. Dense: g is any number, else 0 or 1.
template <VoxelTerm V, bool Dense, class T, class S>
DK_INLINE void add_binary_term(const TermNumbers<S>& n, T z, T g, T m, T* pos, T* neg) {
  if constexpr (V == VoxelTerm::bce) {
    const Sigmoid<T> s = sigmoid<true>(z);
    *pos = *pos + m * (g * s.softneg);
    *neg = *neg + m * ((1 - g) * s.softplus);
  } else if constexpr (Dense) {
    const T loss = m * sigmoid_focal(z, g, n.gamma).loss;
    *pos = *pos + g * loss;
    *neg = *neg + (1 - g) * loss;
  } else {
    const auto hit = g != T{} + 0;
    const T loss = m * hard_focal(select(hit, z, -z), n.gamma).loss;
    *pos = select(hit, *pos + loss, *pos);
    *neg = select(hit, *neg, *neg + loss);
  }
}

// d(a_pos POS + a_neg NEG)/dz
template <VoxelTerm V, bool Dense, class T, class S>
DK_INLINE T binary_slope(const TermNumbers<S>& n, T z, T g, S a_pos, S a_neg) {
  if constexpr (V == VoxelTerm::bce) {
    const Sigmoid<T> s = sigmoid<false>(z);
    return a_neg * (1 - g) * s.p - a_pos * g * s.q;
  } else if constexpr (Dense) {
    return (a_pos * g + a_neg * (1 - g)) * sigmoid_focal(z, g, n.gamma).slope;
  } else {
    const auto hit = g != T{} + 0;
    return select(hit, splat(a_pos), splat(-a_neg)) * hard_focal(select(hit, z, -z), n.gamma).slope;
  }
}

}  // namespace DK_ISA
}  // namespace dicekernels
