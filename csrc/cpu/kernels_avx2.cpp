// The loops for processors with AVX2; see kernels_impl.h.
#if defined(__x86_64__)
#include <cmath>  // before the pragma: nothing of the standard library may be compiled for this target
#include <cstring>

#pragma GCC target("avx2,fma")
#include "kernels.h"

#define FUSEOPT_ISA avx2
#include "kernels_impl.h"

const fuseopt::Kernels fuseopt::kernels_avx2 = fuseopt::avx2::table;
#endif
