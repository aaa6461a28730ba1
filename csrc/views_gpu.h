// What the kernels of augment_views.cu share: which pixels a thread makes, how pixels lie in memory
// between launches and in the end, and their colours.
#pragma once

#include "augment_views.h"
#include "cuda.h"

namespace spd {
namespace {

constexpr int tile_y = view_tile_y, tile_x = view_tile_x, threads = 256;
constexpr int groups = threads / tile_x;    // of threads of one row
constexpr int rows_each = tile_y / groups;  // output rows of a thread, one below the other

struct Job {
    int64_t index;
    int image, view;
};

__device__ inline Job job_of(const GpuRoundArgs& args, int64_t index) {
    const int image = int(index / args.views_made);
    return {index, image, args.view[index % args.views_made]};
}

__device__ inline const ViewParams& row_of(const GpuRoundArgs& args, const Job& job) {
    return args.params[int64_t(job.image) * args.views + job.view];
}

// ---------------------------------------------------------------------------- pixels in memory

__device__ inline void put(float* to, float v) { *to = v; }
__device__ inline void put(Half* to, float v) { to->bits = to_half(v); }
__device__ inline void put(Bfloat* to, float v) { to->bits = to_bfloat16(v); }
__device__ inline void put(uint8_t* to, float v) {
    *to = uint8_t(int(min2(max2(v, 0.f), 255.f) + 0.5f));
}

// bits / most for bits < 2^23: they become the mantissa of 2^23 + bits, since converting integers
// takes four times as long as adding floats.
__device__ inline float from_bits(uint32_t bits, float unit) {
    return (float_of(bits | 0x4b000000) - 8388608.f) * unit;
}

__device__ inline uint32_t to_bits(float v, int most) { return uint32_t(v * most + 0.5f); }

struct KeptPixels {
    void* data;
    int64_t plane;
    bool packed;

    __device__ void put(int64_t job, int64_t at, Rgb p) const {
        if (packed) {
            static_cast<uint32_t*>(data)[job * plane + at] =
                to_bits(p.r, 2047) | to_bits(p.g, 2047) << 11 | to_bits(p.b, 1023) << 22;
        } else {
            uint16_t* to = static_cast<uint16_t*>(data) + 3 * job * plane + at;
            to[0] = uint16_t(to_bits(p.r, 65535));
            to[plane] = uint16_t(to_bits(p.g, 65535));
            to[2 * plane] = uint16_t(to_bits(p.b, 65535));
        }
    }
    __device__ Rgb get(int64_t job, int64_t at) const {
        if (packed) {
            const uint32_t bits = static_cast<const uint32_t*>(data)[job * plane + at];
            return {from_bits(bits & 2047, 1 / 2047.f), from_bits(bits >> 11 & 2047, 1 / 2047.f),
                    from_bits(bits >> 22, 1 / 1023.f)};
        }
        const uint16_t* from = static_cast<const uint16_t*>(data) + 3 * job * plane + at;
        constexpr float unit = 1 / 65535.f;
        return {from_bits(from[0], unit), from_bits(from[plane], unit),
                from_bits(from[2 * plane], unit)};
    }
};

__device__ inline KeptPixels scratch_of(const GpuRoundArgs& args) {
    return {args.scratch, int64_t(args.height) * args.width, args.packed};
}

template <class T>
__device__ inline T* place_of(const GpuViews& views, const Job& job, int y, int x) {
    return static_cast<T*>(views.data) + job.view * views.stride[0] + job.image * views.stride[1] +
           y * views.stride[3] + x * views.stride[4];
}

template <class T>
__device__ inline void put_pixel(T* to, const GpuViews& views, Rgb p) {
    put(to, p.r * views.scale[0] + views.shift[0]);
    put(to + views.stride[2], p.g * views.scale[1] + views.shift[1]);
    put(to + 2 * views.stride[2], p.b * views.scale[2] + views.shift[2]);
}

// --------------------------------------------------------------------------------------- colours

// What a jitter does, worked out once for a block.
struct Adjustments {
    int ops[4], contrast_at;
    float factor[3];  // of brightness, contrast and saturation
    float sixths;     // of a circle, in [0, 6): the hue's
};

__device__ inline Adjustments adjustments_of(float order, float brightness, float contrast,
                                             float saturation, float hue) {
    Adjustments a{{}, 0, {brightness, contrast, saturation}, 6 * (hue - floorf(hue))};
    for (int step = 0; step < 4; ++step) {
        a.ops[step] = jitter_op(int(order), step);
        if (a.ops[step] == 1) a.contrast_at = step;
    }
    return a;
}

__device__ inline Adjustments view_adjustments(const ViewParams& p) {
    return adjustments_of(p.jitter_order, p.brightness, p.contrast, p.saturation, p.hue);
}

__device__ inline Adjustments patch_adjustments(const ViewParams& p) {
    return adjustments_of(p.patch_jitter_order, p.patch_brightness, p.patch_contrast,
                          p.patch_saturation, p.patch_hue);
}

// Steps first..last-1; all threads take the same branches.
__device__ inline Rgb jitter(Rgb p, const Adjustments& a, int first, int last, float mean) {
    for (int step = first; step < last; ++step) {
        const int op = a.ops[step];
        if (op == 3) {
            if (a.sixths != 0) p = adjust_hue(p, a.sixths);
            continue;
        }
        const float factor = a.factor[op];
        if (factor == 1) continue;
        if (op == 2) {
            p = adjust_saturation(p, factor);
        } else {
            const float rest = op == 1 ? (1 - factor) * mean : 0;
            p = {adjust_contrast(p.r, factor, rest), adjust_contrast(p.g, factor, rest),
                 adjust_contrast(p.b, factor, rest)};
        }
    }
    return p;
}

// Sum over the block, in an order that is always the same.
__device__ inline float block_sum(float v) {
    __shared__ float part[threads / warp_size];
    for (int bit = warp_size / 2; bit > 0; bit /= 2) v += __shfl_xor_sync(all_lanes, v, bit);
    if (threadIdx.x % warp_size == 0) part[threadIdx.x / warp_size] = v;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < threads / warp_size; ++warp) sum += part[warp];
    return sum;
}

struct Tile {
    int number, y, x;  // its first pixel
};

__device__ inline Tile tile_of(const GpuRoundArgs& args, int number) {
    const int across = (args.width + tile_x - 1) / tile_x;
    return {number, number / across * tile_y, number % across * tile_x};
}

// Adjusts a thread's pixels up to contrast, keeps them, and leaves the tile's sum of gray.
__device__ inline void keep_up_to_contrast(const GpuRoundArgs& args, const Job& job,
                                           const Adjustments& colors, const Tile& tile,
                                           const Rgb (&pixels)[rows_each]) {
    const KeptPixels scratch = scratch_of(args);
    const int x = tile.x + threadIdx.x % tile_x;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < rows_each; ++i) {
        const int y = tile.y + threadIdx.x / tile_x * rows_each + i;
        if (y >= args.height || x >= args.width) continue;
        const Rgb p = jitter(pixels[i], colors, 0, colors.contrast_at, 0);
        scratch.put(job.index, int64_t(y) * args.width + x, p);
        sum += gray(p.r, p.g, p.b);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) args.sums[job.index * args.tiles + tile.number] = sum;
}

}  // namespace
}  // namespace spd
