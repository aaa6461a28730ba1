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
    int steps_down, steps_across;        // of 16 source pixels that a block of outputs reads
    float gain;                          // 1 / the sum of the taps, as they are rounded
    uint32_t pairs[2 * most_steps + 1];  // of neighbouring taps, half precision

    __device__ Blur(float sigma, int height) : radius(0) {
        if (sigma <= 0) return;
        const int lane = threadIdx.x % warp_size;
        float tap = lane > blur_radius(height) ? 0 : gaussian_tap(lane, sigma);
        tap /= warp_sum(lane ? 2 * tap : tap);
        radius = __popc(__ballot_sync(all_lanes, tap >= negligible_tap)) - 1;
        if (radius == 0) return;
        steps_down = (16 + 2 * radius + 15) / 16;
        steps_across = (8 + 2 * radius + 15) / 16;
        const uint32_t half = lane > radius ? 0 : to_half(tap);
        const float rounded = value_of(Half{uint16_t(half)});
        gain = 1 / warp_sum(lane ? 2 * rounded : rounded);
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

    // Pixels around a tile that are held: as many as whole steps read.
    SPD_HD static int rows_held(int steps_down) { return tile_y - 16 + 16 * steps_down; }
    SPD_HD static int columns_held(int steps_across) { return tile_x - 8 + 16 * steps_across; }
};
static_assert(most_gpu_radius < warp_size, "a lane for every tap");

// Halves of (v - 0.5), where half precision is finest, in pairs: two rows of `around` lie side by
// side, and two columns of `columns`.
struct BlurMemory {
    uint16_t *around, *columns;  // (3, rows / 2, width, 2); one channel: (tile_y, width / 2, 2)
    int rows, width;

    __device__ BlurMemory(uint16_t* memory, const Blur& blur)
        : around(memory),
          rows(Blur::rows_held(blur.steps_down)),
          width(Blur::columns_held(blur.steps_across)) {
        columns = around + 3 * rows * width;
    }
    __device__ uint16_t& pixel(int channel, int y, int x) const {
        return around[((channel * (rows / 2) + y / 2) * width + x) * 2 + y % 2];
    }
    static size_t bytes(int radius) {
        const int width = Blur::columns_held((8 + 2 * radius + 15) / 16);
        return (3 * Blur::rows_held((16 + 2 * radius + 15) / 16) + tile_y) * width * 2;
    }
};

// Blurs a channel of `around`, and leaves the tile there as 16 bits, tile_x to a row.
__device__ inline void blur_channel(const BlurMemory& memory, const Blur& blur, int channel) {
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    const int group = lane / 4, member = lane % 4, width = memory.width;
    auto* around = reinterpret_cast<uint32_t*>(&memory.pixel(channel, 0, 0));
    auto* columns = reinterpret_cast<uint32_t*>(memory.columns);
    const uint32_t (&pairs)[2 * Blur::most_steps + 1] = blur.pairs;
    // A warp makes blocks of 16 x 8 outputs, always of the same rows.
    static_assert(tile_y == 32 && warps % 2 == 0);
    const int row = warp % 2 * 16, first = warp / 2 * 8;
    constexpr int step = warps / 2 * 8;  // columns to a warp's next block
    const uint32_t* from = around + (row / 2 + member) * width + first + group;
    uint32_t* to = columns + (row + group) * (width / 2) + first / 2 + member;
#pragma unroll 1
    for (int column = first; column < width; column += step) {
        float sums[4] = {};
#pragma unroll
        for (int s = 0; s < Blur::most_steps; ++s) {
            if (s < blur.steps_down) {
                const uint32_t taps[4] = {pairs[2 * s + 1], pairs[2 * s], pairs[2 * s + 2],
                                          pairs[2 * s + 1]};
                const uint32_t pixels[2] = {from[8 * s * width], from[(8 * s + 4) * width]};
                multiply_add(sums, taps, pixels);
            }
        }
        to[0] = to_halves(sums[0] * blur.gain, sums[1] * blur.gain);
        to[4 * width] = to_halves(sums[2] * blur.gain, sums[3] * blur.gain);
        from += step;
        to += step / 2;
    }
    __syncthreads();
    from = columns + (row + group) * (width / 2) + first / 2 + member;
    to = around + ((row + group) * tile_x + first) / 2 + member;
#pragma unroll
    for (int column = 0; column < tile_x; column += step, from += step / 2, to += step / 2) {
        float sums[4] = {};
#pragma unroll
        for (int s = 0; s < Blur::most_steps; ++s) {
            if (s < blur.steps_across) {
                const uint32_t* at = from + 8 * s;
                const uint32_t pixels[4] = {at[0], at[4 * width], at[4], at[4 * width + 4]};
                const uint32_t taps[2] = {pairs[2 * s + 1], pairs[2 * s + 2]};
                multiply_add(sums, pixels, taps);
            }
        }
        const auto bits = [&](float sum) { return to_16_bits(clamp01(sum * blur.gain + 0.5f)); };
        to[0] = bits(sums[0]) | uint32_t(bits(sums[1])) << 16;
        to[4 * tile_x] = bits(sums[2]) | uint32_t(bits(sums[3])) << 16;
    }
    __syncthreads();
}

}  // namespace
}  // namespace spd
