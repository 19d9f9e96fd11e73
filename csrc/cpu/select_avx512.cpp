// The loops of pruning for processors with AVX512; see select_impl.h.
#if defined(__x86_64__)
#include <cmath>  // before the pragma: nothing of the standard library may be compiled for this target
#include <cstring>
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#include "select_loops.h"

#define FUSEOPT_AVX512  // g++ before 13 does not define __AVX512F__ after the pragma
#define FUSEOPT_ISA avx512
#include "select_impl.h"

const fuseopt::SelectLoops fuseopt::select_avx512 = fuseopt::avx512::select_table;
#endif
