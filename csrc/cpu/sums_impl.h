// The loops that add up: stage 12, and the norm that clipping asks for. A part of kernels_impl.h.

namespace fuseopt {
namespace FUSEOPT_ISA {

FUSEOPT_INLINE uint32_t free_word(const Span& a, int64_t w) {  // what the step may change
  return (a.keep ? a.keep[w] : ~0u) & ~(a.pruned ? a.pruned[w] : 0u);
}

// The squares of fp32 numbers are exact in double, so that an fma rounds as a product and a sum do.
FUSEOPT_INLINE void add_square(double& sum, float x) {
#if defined(__FMA__)
  sum = fma(double(x), double(x), sum);
#else
  sum += double(x) * double(x);
#endif
}
FUSEOPT_INLINE void add_square(double& sum, double x) { sum += x * x; }

// What the loops below read. `keep` tells which entries of a chunk the step may change, where there are masks.
template <class S>
struct Summed {
  using raw = typename S::raw;
  using T = typename S::compute;
  using lane = typename Bits<sizeof(T)>::type;
  const raw *g, *p, *before;
  StageScalars<T> stage;
  alignas(64) lane keep[kChunk];

  FUSEOPT_INLINE Summed(const Span& a, const void* previous)
      : g(static_cast<const raw*>(a.g)), p(static_cast<const raw*>(a.p)), before(static_cast<const raw*>(previous)),
        stage(rounded<StageScalars, T>(&a.stage->inv_grad_scale)) {
    stage.clip = T(1);  // the norm is of the gradient before clipping
  }

  FUSEOPT_INLINE void spread(const Span& a, int64_t begin, int64_t n) {
    for (int64_t first = 0; first < n; first += 32) {
      uint32_t word = free_word(a, (begin + first) / 32);
      asm("" : "+r"(word));  // see Lanes
      for (int j = 0; j < 32; ++j) keep[first + j] = word & bit_table[0][j];
    }
  }

  template <bool masked>
  FUSEOPT_INLINE T grad(int64_t begin, int64_t i) const {
    return effective_grad(S::load(g[begin + i]), !masked || keep[i] != 0, stage);
  }
  template <bool masked>
  FUSEOPT_INLINE void add_squares(int64_t begin, int64_t n, double* __restrict__ lanes) const {
    prefetch_bytes(g + begin, n * int64_t(sizeof *g), 2 * kAhead);  // from memory, up to twice as fast
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) add_square(lanes[i], grad<masked>(begin, i));
  }
  template <bool masked>
  FUSEOPT_INLINE void add_statistics(int64_t begin, int64_t n, Sums* sums) const {
    lane zeros = 0, nonfinite = 0;  // as wide as the numbers
    double *__restrict__ grads = sums->grad + begin % kLanes, *__restrict__ params = sums->param + begin % kLanes,
           *__restrict__ updates = sums->update + begin % kLanes;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const T x = grad<masked>(begin, i), w = S::load(p[begin + i]);
      add_square(grads[i], x);
      add_square(params[i], w);
      add_square(updates[i], double(w) - double(S::load(before[begin + i])));
      zeros += w == T(0);
      nonfinite += !(x - x == T(0));
    }
    sums->zeros += int64_t(zeros);
    sums->nonfinite += int64_t(nonfinite);
  }
};

template <class S>
void grad_norm(const Span& a, double* lanes) {
  Summed<S> from(a, nullptr);
  for (int64_t begin = 0; begin < a.n; begin += kChunk) {
    const int64_t n = a.n - begin < kChunk ? a.n - begin : kChunk;
    double* lane = lanes + begin % kLanes;
    if (a.keep || a.pruned) from.spread(a, begin, n), from.template add_squares<true>(begin, n, lane);
    else if (n == kChunk) from.template add_squares<false>(begin, kChunk, lane);  // of a known length: without a rest
    else from.template add_squares<false>(begin, n, lane);
  }
}

template <class S>
void statistics(const void* previous, const Span& a, Sums* sums) {
  Summed<S> from(a, previous);
  for (int64_t begin = 0; begin < a.n; begin += kChunk) {
    const int64_t n = a.n - begin < kChunk ? a.n - begin : kChunk;
    if (a.keep || a.pruned) from.spread(a, begin, n), from.template add_statistics<true>(begin, n, sums);
    else if (n == kChunk) from.template add_statistics<false>(begin, kChunk, sums);
    else from.template add_statistics<false>(begin, n, sums);
  }
}

}  // namespace FUSEOPT_ISA
}  // namespace fuseopt
