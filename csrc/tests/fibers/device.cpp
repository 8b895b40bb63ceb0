// One device that is always there: this machine, on which kernels run as fibers.
#include "cuda/device.h"

#include <mutex>

namespace tml::cuda {
namespace {

std::mutex g_fibers;  // csrc/cuda/host/simt.cpp runs one launch at a time

}  // namespace

int num_devices() { return 1; }
std::string device_problem(int) { return ""; }
int num_sms(int) { return 3; }

DeviceGuard::DeviceGuard(int device) : before_(device), is_other_(true) { g_fibers.lock(); }
DeviceGuard::~DeviceGuard() { g_fibers.unlock(); }

}  // namespace tml::cuda
