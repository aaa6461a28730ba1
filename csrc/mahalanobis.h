// PaDiM: the packed triangular factor, fitting it and scoring with it.
#pragma once

#include <cmath>

#include "common.h"

namespace spd {

// A lower triangle of order d is stored in panels of 8 rows: element (i, k) at
// 32 r (r + 1) + 8 k + i % 8 with r = i / 8. One column of a panel is 8 contiguous rows: a vector,
// or 16 bytes in half precision. Scatter, Cholesky factor and whitening factor share these bytes.
SPD_HD static inline int panels(int d) { return (d + 7) / 8; }
SPD_HD static inline size_t panel_start(size_t r) { return 32 * r * (r + 1); }
SPD_HD static inline size_t packed_size(int d) { return panel_start(panels(d)); }
SPD_HD static inline size_t packed_place(int i, int k) {
    return panel_start(i / 8) + 8 * size_t(k) + i % 8;
}

// Feature maps of one network layer, (batch, channels, height, width) in any memory order.
struct Layer {
    const float* data;
    int channels, height, width;
    int64_t stride[4];  // in elements
};

// The kept channels of all layers on the first layer's grid; grid row y reads row
// y * height / grid height of a layer (nearest neighbour).
struct Features {
    const Layer* layers;
    const int32_t* layer;    // (d,): which layer a kept channel is in
    const int32_t* channel;  // (d,): and which of its channels it is
    int d, batch;
    int grid_height, grid_width;
};

struct MahalanobisArgs {
    Features features;
    const float* mean;   // (positions, d)
    const void* factor;  // (positions, packed_size(d))
    DType factor_dtype;  // float32 or float16
    float* out;          // (batch, positions)
};

struct GaussianUpdateArgs {
    Features features;
    int64_t count;   // images folded in before
    float* mean;     // (positions, d), updated
    float* scatter;  // (positions, packed_size(d)), updated
};

struct GaussianFactorArgs {
    float* scatter;  // (positions, packed_size(d)); becomes the whitening factor
    int d;
    int64_t count;
    float ridge;
};

// Positions begin..end of the grid; positions are independent of each other. gaussian_factor
// returns the first position whose covariance is not positive definite, or -1.
#define SPD_DECLARE_GAUSSIAN(isa)                                                        \
    namespace isa {                                                                      \
    void mahalanobis(const MahalanobisArgs& args, int64_t begin, int64_t end);           \
    void gaussian_update(const GaussianUpdateArgs& args, int64_t begin, int64_t end);    \
    int64_t gaussian_factor(const GaussianFactorArgs& args, int64_t begin, int64_t end); \
    }

// Where gathered features go: channel k of image b at position begin + j to
// x + j * position + k * channel + b / group * images + b % group * image.
struct GatherStrides {
    size_t position, channel, images, image;
};

// Reading along positions is contiguous in planar feature maps; with channels last each position is
// contiguous for itself, and needs no company.
constexpr int most_gather_positions = 16;

static inline int gather_positions(const Features& f) {
    const bool channels_last = f.layers[0].stride[1] == 1;
    return channels_last ? 1 : most_gather_positions;
}

// At most `most_gather_positions` of them. Images come in groups that are written together; the
// last group is filled up with the last image.
template <int group>
static inline void gather(const Features& f, int64_t begin, int count, float* x,
                          const GatherStrides& to) {
    int64_t place[most_gather_positions];
    for (int k = 0, end; k < f.d; k = end) {
        const Layer& layer = f.layers[f.layer[k]];
        for (end = k + 1; end < f.d && f.layer[end] == f.layer[k];) ++end;  // a run of channels
        for (int j = 0; j < count; ++j) {
            const int64_t y = (begin + j) / f.grid_width, u = (begin + j) % f.grid_width;
            place[j] = y * layer.height / f.grid_height * layer.stride[2] +
                       u * layer.width / f.grid_width * layer.stride[3];
        }
        for (int b0 = 0; b0 < f.batch; b0 += group) {
            const float* s[group];
            for (int b = 0; b < group; ++b)
                s[b] = layer.data + min2(b0 + b, f.batch - 1) * layer.stride[0];
            float* d = x + b0 / group * to.images;
            for (int i = k; i < end; ++i) {
                const int64_t channel = f.channel[i] * layer.stride[1];
                for (int j = 0; j < count; ++j)
                    for (int b = 0; b < group; ++b)
                        d[j * to.position + i * to.channel + b * to.image] =
                            s[b][channel + place[j]];
            }
        }
    }
}

}  // namespace spd
