#include "threads.h"

#include <pthread.h>
#include <sys/stat.h>

#include <algorithm>

#include "blocks.h"

namespace fuseopt {
namespace {

bool had_threads = false;  // at the last fork
bool lost = false;

void before_fork() {
  struct stat tasks;  // a directory with an entry, and so a link, for each thread
  had_threads = stat("/proc/self/task", &tasks) != 0 || tasks.st_nlink > 3;
}

void in_child() { lost = lost || had_threads; }

}  // namespace

void watch_forks() { pthread_atfork(before_fork, nullptr, in_child); }

bool pool_lost() { return lost; }

bool overlapping(TensorTable& table) {
  bool known = table.extents.size() == table.tensors.size();
  table.extents.resize(table.tensors.size());
  for (size_t k = 0; k < table.tensors.size(); ++k) {
    const Tensor& t = table.tensors[k];
    const char* begin = static_cast<const char*>(t.p);
    const TensorTable::Extent now{begin, begin + t.n * element_size(t.storage)};
    known = known && table.extents[k] == now;
    table.extents[k] = now;
  }
  if (known) return table.in_order;
  auto sorted = table.extents;
  sorted.erase(std::remove_if(sorted.begin(), sorted.end(), [](const auto& e) { return e.first == e.second; }), sorted.end());
  std::sort(sorted.begin(), sorted.end());
  return std::adjacent_find(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.second > b.first; }) !=
         sorted.end();
}

}  // namespace fuseopt
