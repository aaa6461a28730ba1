// mahalanobis_map on the CPU: ||W (x - mean)|| at each position, for a batch of images.

#include "mahalanobis.h"

#include "panel.h"

namespace spd {
namespace SPD_ISA {
namespace {

// Squared norms of W x for N images at one position; x is (d rounded up to 8, stride).
template <int N, class T>
void squared_norms(const T* factor, int panel_count, const float* x, size_t stride, float* out) {
    Rows total[N] = {};
    for (int r = 0; r < panel_count; ++r) {
        const T* panel = factor + panel_start(r);
        Rows y[N] = {};
        const float* xk = x;
        for (int k = 0; k < 8 * (r + 1); ++k, xk += stride) {
            const Rows column = load_rows(panel + 8 * k);
            for (int b = 0; b < N; ++b) y[b] += column * xk[b];
        }
        for (int b = 0; b < N; ++b) total[b] += y[b] * y[b];
    }
    for (int b = 0; b < N; ++b) {
        float sum = 0;
        for (int i = 0; i < 8; ++i) sum += total[b][i];
        out[b] = sum;
    }
}

// One image has only one dot product per row to run: four partial sums hide the latency of the add.
template <class T>
float squared_norm(const T* factor, int panel_count, const float* x) {
    Rows total = {};
    for (int r = 0; r < panel_count; ++r) {
        const T* panel = factor + panel_start(r);
        Rows y[4] = {};
        for (int k = 0; k < 8 * (r + 1); k += 4)
            for (int i = 0; i < 4; ++i) y[i] += load_rows(panel + 8 * (k + i)) * x[k + i];
        const Rows sum = (y[0] + y[1]) + (y[2] + y[3]);
        total += sum * sum;
    }
    float sum = 0;
    for (int i = 0; i < 8; ++i) sum += total[i];
    return sum;
}

template <class T>
void position(const T* factor, int d, int batch, const float* x, size_t stride, float* squared) {
    if (batch == 1) {
        squared[0] = squared_norm(factor, panels(d), x);
        return;
    }
    int b = 0;
    for (; b + 8 <= batch; b += 8) squared_norms<8>(factor, panels(d), x + b, stride, squared + b);
    for (; b < batch; b += 4)  // x and `squared` are padded to a multiple of 4 images
        squared_norms<4>(factor, panels(d), x + b, stride, squared + b);
}

}  // namespace

void mahalanobis(const MahalanobisArgs& args, int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    const Features& f = args.features;
    const int64_t positions = int64_t(f.grid_height) * f.grid_width;
    const size_t stride = f.batch == 1 ? 1 : (f.batch + 3) / 4 * 4;
    // 16 floats more between positions: a power-of-two stride would fall into one cache set.
    const size_t position_stride = 8 * size_t(panels(f.d)) * stride + 16;
    Pieces pieces = scratch.reserve(gather_positions * position_stride + stride + 64);
    float* x = pieces.take(gather_positions * position_stride);
    float* squared = pieces.take(stride);
    memset(x, 0, gather_positions * position_stride * sizeof(float));
    for (int64_t p0 = begin; p0 < end; p0 += gather_positions) {
        const int count = int(min2<int64_t>(gather_positions, end - p0));
        gather(f, p0, count, x, position_stride, stride, 1);
        for (int j = 0; j < count; ++j) {
            const int64_t p = p0 + j;
            float* delta = x + j * position_stride;
            for (int k = 0; k < f.d; ++k) {
                const float mean = args.mean[p * f.d + k];
                for (int b = 0; b < f.batch; ++b) delta[k * stride + b] -= mean;
            }
            const size_t offset = p * packed_size(f.d);
            if (args.factor_dtype == DType::float16)
                position(static_cast<const uint16_t*>(args.factor) + offset, f.d, f.batch, delta,
                         stride, squared);
            else
                position(static_cast<const float*>(args.factor) + offset, f.d, f.batch, delta,
                         stride, squared);
            for (int b = 0; b < f.batch; ++b) args.out[b * positions + p] = sqrtf(squared[b]);
        }
    }
}

}  // namespace SPD_ISA
}  // namespace spd
