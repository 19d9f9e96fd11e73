// How many threads may work on a table at once.
#pragma once

#include <omp.h>

#include "../tensor_table.h"

namespace fuseopt {

// Called once at import. OpenMP's pool does not survive a fork: in the child of a process that had threads, the
// first parallel region would wait for them for ever, so there everything runs in one.
void watch_forks();
bool pool_lost();

// omp_get_max_threads() is torch's number: one OpenMP pool serves both.
inline int threads_for(const TensorTable& table) {
  const int items = int(table.items.size()) - 1, most = omp_get_max_threads();
  return table.in_order || pool_lost() || items < 1 ? 1 : items < most ? items : most;
}

}  // namespace fuseopt
