// The blur of augment_views.cu: products of half precision with band matrices, on tensor cores. By
// additions alone it would take more instructions than all else that is done to a view.
#pragma once

#include "views_gpu.h"

namespace spd {
namespace {

// A blur along one axis is a product with a matrix whose every row has the same taps, one place
// further on. As the product's operands lie in a warp (see multiply_add), a lane then needs few
// different pairs of taps, for blocks of 16 places and for both axes.
struct Blur {
    // All lanes of a warp must make theirs, as they exchange taps. Of a blur of radius 0, which is
    // none, the radius alone is set.
    static constexpr int most_steps = (16 + 2 * most_gpu_radius + 15) / 16;
    int radius;
    float gain;                          // 1 / the square of the sum of the taps, as rounded
    uint32_t pairs[2 * most_steps + 1];  // of neighbouring taps, half precision

    __device__ Blur(float sigma, int height) : radius(0) {
        if (sigma <= 0) return;
        const int lane = threadIdx.x % warp_size;
        float tap = lane > blur_radius(height) ? 0 : gaussian_tap(lane, sigma);
        tap /= warp_sum(lane ? 2 * tap : tap);
        radius =
            __shfl_sync(all_lanes, __popc(__ballot_sync(all_lanes, tap >= negligible_tap)) - 1, 0);
        if (radius == 0) return;
        const uint32_t half = lane > radius ? 0 : to_half(tap);
        const float rounded = value_of(Half{uint16_t(half)});
        const float sum = warp_sum(lane ? 2 * rounded : rounded);
        gain = 1 / (sum * sum);
#pragma unroll
        for (int i = 0; i < 2 * most_steps + 1; ++i) {
            const int place = lane % 4 * 2 - lane / 4 + 8 * (i - 1) - radius;
            const uint32_t first = at(half, place), second = at(half, place + 1);
            pairs[i] = first | second << 16;
        }
    }

    // The tap of a place, which the lane of that number has.
    __device__ uint32_t at(uint32_t half, int place) const {
        const int distance = place < 0 ? -place : place;
        const uint32_t found = __shfl_sync(all_lanes, half, distance);
        return distance > radius ? 0 : found;
    }

    // Steps of 16 source pixels that 16 rows and 8 columns read.
    __device__ int steps_down() const { return (16 + 2 * radius + 15) / 16; }
    __device__ int steps_across() const { return (8 + 2 * radius + 15) / 16; }

    // What they read of a tile and around it.
    __device__ int columns() const { return tile_x - 8 + 16 * steps_across(); }
};
static_assert(most_gpu_radius < warp_size, "a lane for every tap");

// A tile and what is around it: halves of (v - 0.5), where half precision is finest, in pairs of
// two rows. Column x of a view lies at (x + radius) % columns: the next tile takes over what it
// needs. The length of a row keeps the lanes of a product in different banks.
struct BlurMemory {
    static constexpr int rows = tile_y - 16 + 16 * Blur::most_steps;
    static constexpr int columns = tile_x - 8 + 16 * ((8 + 2 * most_gpu_radius + 15) / 16);
    static constexpr int plane = rows / 2 * columns;
    static_assert(columns % 32 == 8 || columns % 32 == 24);
    uint32_t pairs[3][rows / 2][columns];
};

// Blurs a channel of a warp's 16 x 16 pixels, but for the gain and the 0.5. The product down the
// columns gives 8 columns at a time, in the very lanes where the product along the rows needs them.
__device__ inline void blur_channel(float (&values)[pixels_each], const BlurMemory& memory,
                                    const Job& job, const Blur& blur, int channel) {
    const int lane = threadIdx.x % warp_size;
    const uint32_t (&pairs)[2 * Blur::most_steps + 1] = blur.pairs;
    const int steps_down = blur.steps_down(), steps_across = blur.steps_across();
    constexpr int most_blocks = BlurMemory::columns / 8;
    const int first_block = (job.left + job.block_x() * side) / 8 % most_blocks;
    const uint32_t* from = &memory.pairs[channel][job.block_y() * side / 2 + lane % 4][lane / 4];
    struct Columns {
        uint32_t upper, lower;  // rows
    };
    const auto down = [&](int i) {  // the i-th 8 columns
        const int block = first_block + i;
        const uint32_t* first = from + 8 * (block < most_blocks ? block : block - most_blocks);
        float sums[4] = {};
#pragma unroll
        for (int s = 0; s < Blur::most_steps; ++s) {
            if (s < 2 || s < steps_down) {  // two at least
                const uint32_t* at = first + 8 * s * BlurMemory::columns;
                const uint32_t source[2] = {at[0], at[4 * BlurMemory::columns]};
                multiply_add(sums,
                             {pairs[2 * s + 1], pairs[2 * s], pairs[2 * s + 2], pairs[2 * s + 1]},
                             source);
            }
        }
        return Columns{to_halves(sums[0], sums[1]), to_halves(sums[2], sums[3])};
    };
    float sums[2][4] = {};  // of the left and the right 8 columns
    const auto across = [&](int half, int s, const Columns& a, const Columns& b) {
        const uint32_t source[4] = {a.upper, a.lower, b.upper, b.lower};
        multiply_add(sums[half], source, {pairs[2 * s + 1], pairs[2 * s + 2]});
    };
    Columns first = down(0);
#pragma unroll
    for (int s = 0; s < Blur::most_steps; ++s) {
        if (s < steps_across) {
            const Columns second = down(2 * s + 1), third = down(2 * s + 2);
            across(0, s, first, second);
            across(1, s, second, third);
            first = third;
        }
    }
#pragma unroll
    for (int i = 0; i < pixels_each; ++i) values[i] = sums[i / 2 % 2][i / 4 * 2 + i % 2];
}

}  // namespace
}  // namespace spd
