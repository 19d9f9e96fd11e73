#include "threads.h"

#include <pthread.h>
#include <sys/stat.h>

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

}  // namespace fuseopt
