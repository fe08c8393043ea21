#include <gtest/gtest.h>

#include <string>

#include "backends/register.h"
#include "core/check.h"

namespace flexcore {
namespace {

// In a build without the backend, without a GPU, and for one device more than there are.
TEST(Device, WhatIsNotThereIsADeviceError) {
  const int count = num_cuda_devices();
  try {
    open_device({DeviceKind::kCuda, count});
    FAIL() << "there is a device " << count;
  } catch (const DeviceError& error) {
    const std::string what = error.what();
    EXPECT_EQ(what.find("device: cuda"), 0u) << what;
    if (count == 0)
      EXPECT_NE(what.find("; wanted cpu"), std::string::npos) << what;
    else
      EXPECT_NE(what.find("but this machine has " + std::to_string(count)), std::string::npos) << what;
  }
  EXPECT_THROW(open_device({DeviceKind::kCuda, -1}), DeviceError);
}

}  // namespace
}  // namespace flexcore
