// Which devices the kernels run on. No call here needs a driver to be installed.
#pragma once

#include <string>

namespace tml::cuda {

int num_devices();  // 0 where there is no driver
// Why the kernels cannot run on a device; empty if they can.
std::string device_problem(int device);
int num_sms(int device);

// Makes a device current for the life of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
  bool is_other_;
};

}  // namespace tml::cuda
