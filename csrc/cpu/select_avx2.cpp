// The loops of pruning for processors with AVX2; see select_impl.h.
#if defined(__x86_64__)
#include <cmath>  // before the pragma: nothing of the standard library may be compiled for this target
#include <cstring>

#pragma GCC target("avx2,fma")
#include "select_loops.h"

#define FUSEOPT_ISA avx2
#include "select_impl.h"

const fuseopt::SelectLoops fuseopt::select_avx2 = fuseopt::avx2::select_table;
#endif
