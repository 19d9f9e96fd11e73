// Chooses the loops for the processor that runs.
#include <cstring>

#include "kernels.h"

namespace fuseopt {
namespace {

bool runs(const Kernels& k) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&k == &kernels_avx2) return avx2;
  if (&k == &kernels_avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return &k == &kernels_portable;
}

const Kernels* const all[] = {
#if defined(__x86_64__)
    &kernels_avx512, &kernels_avx2,
#endif
    &kernels_portable};

const Kernels* best() {
  for (const Kernels* k : all)
    if (runs(*k)) return k;
  return &kernels_portable;
}

const Kernels* chosen = nullptr;

}  // namespace

const Kernels& kernels() {
  if (!chosen) chosen = best();
  return *chosen;
}

bool set_kernels(const char* name) {
  for (const Kernels* k : all)
    if (std::strcmp(k->name, name) == 0 && runs(*k)) {
      chosen = k;
      return true;
    }
  return false;
}

}  // namespace fuseopt
