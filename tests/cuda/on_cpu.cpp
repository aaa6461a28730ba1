// The CUDA kernels as a Python module whose functions run on the CPU, through the product's
// bindings.

#include "../../csrc/bindings_cuda.cpp"

namespace spd {
CudaState cuda_state() { return {0, 0, 0, ""}; }
const char* cuda_launch_error() { return nullptr; }
}  // namespace spd

PYBIND11_MODULE(cuda_on_cpu, m) { spd::bind_cuda(m); }
