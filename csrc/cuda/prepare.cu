// What a step decides and forms on the device before the pass: whether it counts, the norm, counters, scalars.
#include "block.h"
#include "kernels.h"
#include "launch.h"

namespace fuseopt {
namespace cuda {
namespace {

// Advances the counters and forms Rule::Scalars<double>.
__device__ void prepare_rule(int rule, const double* hyper, CounterValue* counter, double* scalars) {
  switch (rule) {
#define FUSEOPT_PREPARE(Rule, name)                                   \
  case k##Rule: {                                                     \
    const auto s = Rule::prepare(hyper, counter);                     \
    std::memcpy(scalars, &s, sizeof s);                               \
    break;                                                            \
  }
    FUSEOPT_RULES(FUSEOPT_PREPARE)
#undef FUSEOPT_PREPARE
  }
}

__device__ __forceinline__ double load(const void* at, bool is_double) {
  return is_double ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
}

__device__ __forceinline__ void store(void* at, bool is_double, double value) {
  if (is_double) *static_cast<double*>(at) = value;
  else *static_cast<float*>(at) = float(value);
}

// The stages' scalars in the step t; lr is *options.lr.
__device__ void prepare_stages(const Group& group, const PrepareArgs& a, double lr, TensorScalars& out) {
  const Control& control = *a.memory.control;
  out.stage = group.stage;
  out.stage.inv_grad_scale = inv_grad_scale(a.amp, group.stage.inv_grad_scale);
  out.stage.clip = group.max_grad_norm > 0 ? clip_factor(group.max_grad_norm, control.norm) : 1;
  if (group.device.decoupled) decouple_decay(out.stage, lr, group.device.l2, group.device.l1);
  if (control.t < group.device.prune_from) out.stage.prune_below = 0;
#pragma unroll 1
  for (int k = 0; k < group.n_ema; ++k) out.ema_weight[k] = ema_weight(group.device.ema[k], control.t);
}

// The order of sums.h add_blocks.
__device__ double add_blocks_on_device(const double* sums, int blocks) {
  __shared__ double lanes[kLanes];
  double sum = 0;
  for (int64_t b = threadIdx.x; b < blocks; b += kLanes) sum += sums[b];
  lanes[threadIdx.x] = sum;
  return add_lanes_of_block<1>(lanes);
}

__global__ void __launch_bounds__(kLanes) prepare(const PrepareArgs __grid_constant__ a) {
  Control& control = *a.memory.control;
  const int k = int(threadIdx.x);
  const PrepareRow& row = a.rows[k < a.tensors ? k : 0];
  const Group& group = a.groups[k < a.tensors ? row.group : 0];
  // Read before any is written: tensors may share a counter, which then advances by one.
  CounterValue counter[kMaxCounters] = {};
  if (k < a.tensors) {
    if (group.counters == 0) counter[0].value = a.memory.fresh[row.position];
#pragma unroll
    for (int c = 0; c < kMaxCounters; ++c)
      if (c < group.counters) counter[c] = {load(row.counter[c], row.is_double[c]), bool(row.is_double[c])};
  }
  double total = 0;
  if (a.clips) total = a.given_squares ? *a.given_squares : add_blocks_on_device(a.memory.squares, a.blocks);
  if (k == 0 && a.starts) {
    control.skip = a.amp.found_inf && *a.amp.found_inf != 0;
    if (a.advances && control.skip == 0) control.t += 1;
    if (a.clips) control.norm = std::sqrt(total);
  }
  __syncthreads();
  if (control.skip != 0 || k >= a.tensors) return;
  double hyper[kMaxHyper];
  for (int h = 0; h < kMaxHyper; ++h) hyper[h] = group.hyper[h];
  if (group.device.lr) hyper[0] = load(group.device.lr, group.device.lr_is_double);
  TensorScalars& out = a.memory.scalars[row.tensor];
  prepare_rule(group.rule, hyper, counter, out.rule);
  prepare_stages(group, a, hyper[0], out);
#pragma unroll
  for (int c = 0; c < kMaxCounters; ++c)
    if (c < group.counters) store(row.counter[c], row.is_double[c], counter[c].value);
  a.memory.fresh[row.position] = 0;
}

}  // namespace

const char* problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, prepare);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

void launch_prepare(const PrepareArgs& args, cudaStream_t stream) { launch(prepare, 1, int(kLanes), stream, args); }

}  // namespace cuda
}  // namespace fuseopt
