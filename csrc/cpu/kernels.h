// The inner loops, one table of them per instruction set; all tables give the same bits.
#pragma once

#include "../pipeline.h"
#include "../streams.h"
#include "../sums.h"

namespace fuseopt {

constexpr int64_t kTile = 1024;  // elements that stay in the first-level cache between loops

// A run of elements of one tensor; of at most kTile where masks are involved. `keep` and `pruned` are words of bits, bit
// 0 of word 0 for the first element; update_masked reads both, the others take nullptr for "all kept" and "none pruned".
struct Span {
  int64_t n;
  void* p;
  const void* g;
  void* slot[kMaxSlots];
  const uint32_t* keep;
  uint32_t* pruned;
  bool freeze;
  void* ema;  // an average that update() takes along; nullptr for none
  double ema_weight;
  const StageScalars<double>* stage;
  const double* scalars;  // Rule::Scalars<double>
};

struct Sums {  // lane sums of squares, and counts
  double grad[kLanes], param[kLanes], update[kLanes];
  int64_t zeros, nonfinite;
};

struct Kernels {
  const char* name;
  // Stages 1 to 10, and 11 for one average; by whether there is one: most have one or none, and in the
  // same loop it costs its memory alone.
  void (*update[2][kRules][kStorages])(const Span&);
  void (*update_masked[2][kRules][kStorages])(const Span&);
  // Marks in `pruned` what a threshold pruned: stage 10 left it at zero, below the threshold.
  void (*mark_pruned[kStorages])(const Span&);
  // Stage 11, for further averages; by whether they are kept in the parameter's type or in that of the arithmetic.
  void (*ema[2][kStorages])(void* ema, const Span&, double weight);
  // Adds the squares of the unscaled, kept gradient to kLanes lanes.
  void (*grad_norm[kStorages])(const Span&, double* lanes);
  // Stage 12; `before` is the parameter as it was.
  void (*statistics[kStorages])(const void* before, const Span&, Sums*);
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512;
const Kernels& kernels();                  // the best table for this processor
bool set_kernels(const char* name);        // by name, for tests; false if this processor cannot run it

}  // namespace fuseopt
