// The loops for any processor.
#include "kernels.h"

#define FUSEOPT_ISA portable
#include "kernels_impl.h"

const fuseopt::Kernels fuseopt::kernels_portable = fuseopt::portable::table;
