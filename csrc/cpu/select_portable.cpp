// The loops of pruning for any processor, and the choice among all.
#include <cstring>

#include "kernels.h"
#include "select_loops.h"

#define FUSEOPT_ISA portable
#include "select_impl.h"

const fuseopt::SelectLoops fuseopt::select_portable = fuseopt::portable::select_table;

const fuseopt::SelectLoops& fuseopt::select_loops() {
#if defined(__x86_64__)
  if (std::strcmp(kernels().name, select_avx512.name) == 0) return select_avx512;
  if (std::strcmp(kernels().name, select_avx2.name) == 0) return select_avx2;
#endif
  return select_portable;
}
