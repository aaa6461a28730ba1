// PaDiM: the packed triangular factor, fitting it and scoring with it.
#pragma once

#include <cmath>

#include "common.h"

namespace spd {

// A lower triangle of order d is stored in panels of 8 rows: element (i, k) at
// 32 r (r + 1) + 8 k + i % 8 with r = i / 8. One column of a panel is 8 contiguous rows: a vector,
// or 16 bytes in half precision. Scatter, Cholesky factor and whitening factor share these bytes.
SPD_HD static inline constexpr int panels(int d) { return (d + 7) / 8; }
SPD_HD static inline size_t panel_start(size_t r) { return 32 * r * (r + 1); }
SPD_HD static inline size_t packed_size(int d) { return panel_start(panels(d)); }
SPD_HD static inline size_t packed_place(int i, int k) {
    return panel_start(i / 8) + 8 * size_t(k) + i % 8;
}

// The whitening factor in 8 bits: every panel begins with a float32 scale of each of its rows and a
// float32 diagonal element of each, 64 bytes, before its columns of 8 bytes, zero on the diagonal.
SPD_HD static inline size_t quantized_size(int d) { return packed_size(d) + 64 * panels(d); }

// Where the columns of panel r are.
template <class T>
SPD_HD static inline const T* panel_of(const T* factor, int r) {
    return factor + panel_start(r) + (sizeof(T) == 1 ? 64 * (r + 1) : 0);
}

// Feature maps of one network layer, (batch, channels, height, width) in any memory order.
struct Layer {
    const float* data;
    int channels, height, width;
    int64_t stride[4];            // in elements
    const int64_t *row, *column;  // where what a row and a column of the grid read begins
    int cell;                     // about how many columns of the grid read the same
};

// The kept channels of all layers on the first layer's grid, by nearest neighbour.
struct Features {
    const Layer* layers;
    const int32_t* layer;    // (d,): which layer a kept channel is in
    const int32_t* end;      // (d,): the next kept channel that is not in that layer
    const int64_t* channel;  // (d,): and where its elements begin there
    int d, batch;
    int grid_height, grid_width;
};

enum class FactorType { float32, float16, bfloat16, int8 };

struct MahalanobisArgs {
    Features features;
    const float* mean;   // (positions, d)
    const void* factor;  // (positions, packed_size(d)), or quantized_size(d) of int8
    FactorType factor_type;
    float* out;  // (batch, positions)
};

// On a GPU. All pointers are the device's; kept channels are looked for in the layers there.
constexpr int most_layers = 4, most_images = 4;
constexpr int most_channels = 3000;  // whose values fit into 47 KB, for 4 images
struct GpuMahalanobisArgs {
    Layer layer[most_layers];  // without row, column and cell
    int layers;
    const int64_t* channels;  // (d,) in the concatenation of the layers; one out of range reads 0
    int d, batch;
    int grid_height, grid_width;
    const float* mean;   // (positions, d)
    const void* factor;  // (positions, packed_size(d)), 16-byte aligned, not int8
    FactorType factor_type;
    float* out;  // (batch, positions)
    void* stream;
};
void mahalanobis_cuda(const GpuMahalanobisArgs& args);

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

// mahalanobis takes tiles begin..end of the grid, numbered row by row: two rows high, as the deeper
// layers have cells in common there. The other two take positions. All are independent of each
// other. False: out of memory.
constexpr int tile_rows = 2, tile_columns = 32;
static inline int tiles_across(const Features& f) {
    return (f.grid_width + tile_columns - 1) / tile_columns;
}
static inline int tiles_down(const Features& f) {
    return (f.grid_height + tile_rows - 1) / tile_rows;
}
// gaussian_factor returns the first position whose covariance is not positive definite, or one of
// these.
constexpr int64_t all_positive = -1, no_memory = -2;
#define SPD_DECLARE_GAUSSIAN(isa)                                                        \
    namespace isa {                                                                      \
    bool mahalanobis(const MahalanobisArgs& args, int64_t begin, int64_t end);           \
    bool gaussian_update(const GaussianUpdateArgs& args, int64_t begin, int64_t end);    \
    int64_t gaussian_factor(const GaussianFactorArgs& args, int64_t begin, int64_t end); \
    }

// Reading along positions is contiguous in planar feature maps: so many come at a time, but of a
// single image. With channels last each position is contiguous for itself.
constexpr int planar_positions = 16;

static inline bool channels_are_last(const Features& f) { return f.layers[0].stride[1] == 1; }

// Images that are gathered together, and share what is loaded of the factor.
constexpr int quad = 4;

// Calls put(q, k, j, values) with channel k at position begin + j of images quad * q and following;
// past the last image its values stand again. count <= block. With one position at a time, a layer
// is left out where position `before` (or -1) read the same cell of it: what was put then still
// stands. And the cell that the row reads next is asked for, spread over the positions that share
// the one before, as the images lie too far apart for the processor to foresee it.
template <int block, class Put>
static inline void gather(const Features& f, int64_t begin, int count, int64_t before,
                          const Put& put) {
    constexpr bool by_cells = block == 1;
    if (by_cells) count = 1;  // a constant: then there is no loop over j
    const int y = int(begin / f.grid_width), u = int(begin % f.grid_width);
    const int y_before = int(before / f.grid_width), u_before = int(before % f.grid_width);
    int64_t place[block];
    for (int k = 0, end; k < f.d; k = end) {
        const Layer& layer = f.layers[f.layer[k]];
        end = f.end[k];
        int row = y, column = u;
        place[0] = layer.row[y] + layer.column[u];
        for (int j = 1; j < count; ++j) {
            if (++column == f.grid_width) column = 0, ++row;
            place[j] = layer.row[row] + layer.column[column];
        }
        const bool same_row = by_cells && before >= 0 && layer.row[y_before] == layer.row[y];
        const bool left_out = same_row && layer.column[u_before] == layer.column[u];
        const bool asked = same_row && u_before == u;  // by the row above
        const bool asks =
            by_cells && layer.stride[1] == 1 && u + layer.cell < f.grid_width && !asked;
        const int64_t next = asks ? layer.row[y] + layer.column[u + layer.cell] : 0;
        const int part = u % layer.cell;
        for (int q = 0; q * quad < f.batch; ++q) {
            const float* s[quad];
            for (int b = 0; b < quad; ++b)
                s[b] = layer.data + min2(q * quad + b, f.batch - 1) * layer.stride[0];
            for (int i = k; i < end && !left_out; ++i)
                for (int j = 0; j < count; ++j) {
                    float values[quad];
                    for (int b = 0; b < quad; ++b) values[b] = s[b][f.channel[i] + place[j]];
                    put(q, i, j, values);
                }
            constexpr int line = 16;
            for (int b = 0; b < min2(quad, f.batch - q * quad) && asks; ++b)
                for (int64_t c = f.channel[k] + line * part; c <= f.channel[end - 1];
                     c += line * layer.cell)
                    __builtin_prefetch(s[b] + next + c, 0, 2);
        }
    }
}

}  // namespace spd
