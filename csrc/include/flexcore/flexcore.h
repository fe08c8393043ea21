#pragma once

#include "flexcore/config.h"
#include "flexcore/engine.h"
#include "flexcore/error.h"
#include "flexcore/ops.h"
#include "flexcore/plan.h"
#include "flexcore/tensor.h"
