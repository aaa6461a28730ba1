// What the CUDA runtime says of this machine; works without a driver.

#include "cuda.h"

namespace spd {

CudaState cuda_state() {
    CudaState state{0, 0, 0, ""};
    cudaRuntimeGetVersion(&state.runtime);
    cudaDriverGetVersion(&state.driver);  // 0 without a driver
    const cudaError_t error = cudaGetDeviceCount(&state.devices);
    if (error != cudaSuccess) {
        state.devices = 0;
        // Without a driver the runtime finds the driver too old.
        const bool none = state.driver == 0 || error == cudaErrorNoDevice;
        state.error = none ? "" : cudaGetErrorString(error);
        cudaGetLastError();  // it would be reported again by the next launch
    }
    return state;
}

const char* cuda_launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace spd
