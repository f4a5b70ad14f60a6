// What the plans need to know of a device of this machine.
#pragma once

#include "plan.h"

namespace cmx {

// Asked once a device, then remembered. `device` exists: cmx_cuda_why_not(device) has been asked.
const Gpu& gpu_of(int device);

}  // namespace cmx
