// The loops for processors with AVX512; see kernels_impl.h.
#if defined(__x86_64__)
#include <cmath>  // before the pragma: nothing of the standard library may be compiled for this target
#include <cstring>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#include "kernels.h"

#define FUSEOPT_ISA avx512
#include "kernels_impl.h"

const fuseopt::Kernels fuseopt::kernels_avx512 = fuseopt::avx512::table;
#endif
