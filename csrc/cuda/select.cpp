#include "select.h"

#include <stdexcept>

#include "launch.h"
#include "pack.h"

namespace fuseopt {
namespace cuda {
namespace {

// Calls run(storage, rows) until every tensor that `take` takes was in some rows.
template <class Take, class Run>
void for_each_launch(const TensorTable& table, bool streams, const Take& take, const Run& run) {
  const OnDevice on(table.device);
  static thread_local Rows rows;
  for (int storage = 0; storage < kStorages; ++storage)
    pack(table, 0, int(table.tensors.size()), streams, rows,
         [&](const Tensor& t) { return t.storage == storage && take(t); }, [&] { run(storage, rows); });
}

bool any(const Tensor&) { return true; }

}  // namespace

void count_digits(const TensorTable& table, uint32_t prefix, int shift, int width, int64_t* out, cudaStream_t stream) {
  if (width > kMaxDigit) throw std::length_error("fuseopt: a digit has more bits than there are bins for");
  for_each_launch(table, false, any,
                  [&](int storage, const Rows& rows) { launch_digits(storage, rows, prefix, shift, width, out, stream); });
}

void count_ties(const TensorTable& table, uint32_t kth, int64_t* out, cudaStream_t stream) {
  for_each_launch(table, false, any, [&](int storage, const Rows& rows) { launch_ties(storage, rows, kth, out, stream); });
}

void prune_up_to(const TensorTable& table, uint32_t kth, const int64_t* quota, cudaStream_t stream) {
  for (const bool keep_moments : {false, true}) {
    const auto take = [&](const Tensor& t) { return (table.groups[t.group].stage.keep_moments != 0) == keep_moments; };
    for_each_launch(table, true, take, [&](int storage, const Rows& rows) {
      launch_prune(storage, rows, kth, quota, keep_moments, stream);
    });
  }
}

}  // namespace cuda
}  // namespace fuseopt
