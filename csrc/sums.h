// How sums are formed: in double, over fixed blocks in a fixed order, so that they have the same bits whatever
// works on them. Element i of a block is added to lane i % kLanes; then lanes are halved until one is left. The
// sums of many blocks are added up in the same way.
#pragma once

#include <algorithm>
#include <vector>

#include "math.h"

namespace fuseopt {

constexpr int64_t kBlock = 4096;  // consecutive elements of one tensor
constexpr int64_t kLanes = 1024;

// The sum of the lanes that a run of n elements touched.
inline double add_lanes(double* lanes, int64_t n) {
  int64_t width = 1;
  while (width < n && width < kLanes) width *= 2;
  for (width /= 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline double add_blocks(const std::vector<double>& sums) {
  alignas(64) double lanes[kLanes] = {};
  for (size_t b = 0; b < sums.size(); ++b) lanes[b % kLanes] += sums[b];
  return add_lanes(lanes, int64_t(sums.size()));
}

}  // namespace fuseopt
