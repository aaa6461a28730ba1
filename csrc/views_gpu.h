// What the kernels of augment_views.cu share: which pixels a thread makes, how pixels lie in memory
// between launches and in the end, and their colours.
#pragma once

#include "augment_views.h"
#include "cuda.h"

namespace spd {
namespace {

// A block makes a tile of one view. Each of its warps makes a few rows of the tile, and a thread
// of it the same columns of each: what depends on the row is then the same for the whole warp.
constexpr int tile_y = view_tile_y, tile_x = view_tile_x, threads = 256;
constexpr int warps = threads / warp_size;
constexpr int rows_each = tile_y / warps, columns_each = tile_x / warp_size;
constexpr int pixels_each = rows_each * columns_each;

struct Job {
    int64_t index;
    int image, view;
    int top, left;    // the tile's first pixel
    int row, column;  // the thread's first pixel
};

__device__ inline Job job_of(const GpuRoundArgs& args) {
    const unsigned index = args.first_job + blockIdx.z, image = index / unsigned(args.views_made);
    const int top = blockIdx.y * tile_y, left = blockIdx.x * tile_x;
    return {index,
            int(image),
            args.view[index - image * args.views_made],
            top,
            left,
            top + int(threadIdx.x) / warp_size * rows_each,
            left + int(threadIdx.x) % warp_size};
}

// Calls f(which, y, x) for those of a thread's pixels that are inside the view.
template <class F>
__device__ inline void for_pixels(const GpuRoundArgs& args, const Job& job, const F& f) {
#pragma unroll
    for (int i = 0; i < pixels_each; ++i) {
        const int y = job.row + i / columns_each, x = job.column + i % columns_each * warp_size;
        if (y < args.height && x < args.width) f(i, y, x);
    }
}

// As reflect, but quick where one reflection is enough.
__device__ inline int mirrored(int i, int n) {
    int place = i < 0 ? -i : i < n ? i : 2 * n - 2 - i;
    if (place < 0 || place >= n) place = reflect(i, n);
    return place;
}

// The three planes of a view, or of what is kept of one. Offsets in a plane fit into 32 bits, and
// take fewer instructions than addresses do.
template <class T>
struct Planes {
    T *r, *g, *b;
    int down, across;  // from row to row and column to column, in elements

    __device__ int at(int y, int x) const { return y * down + x * across; }
};

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

// 2^15 + the byte.
__device__ inline float over_byte(uint8_t byte) { return float_of(byte * 256u + 0x47000000); }

// Bits < 2^23 become the mantissa of 2^23 + bits, and back: converting integers takes four times as
// long as adding floats.
constexpr float two_23 = 8388608.f;
__device__ inline float from_bits(uint32_t bits) { return float_of(bits | 0x4b000000) - two_23; }
__device__ inline uint32_t to_bits(float v, float most) {
    return bits_of(v * most + two_23) & 0x7fffff;
}

// Of values in [0, 1]. As the most is a power of two, one multiplication and addition is exact.
constexpr float most_16 = 32768;
__device__ inline uint16_t to_16_bits(float v) { return uint16_t(bits_of(v * most_16 + two_23)); }
__device__ inline float from_16_bits(uint16_t bits) {
    return float_of(bits | 0x4b000000) * (1 / most_16) - two_23 / most_16;
}

// The views of a round between launches: three planes of 16 bits, or packed into 11, 11 and 10.
template <bool packed>
struct KeptPixels {
    Planes<uint16_t> planes;
    uint32_t* pixels;

    __device__ KeptPixels(const GpuRoundArgs& args, const Job& job) {
        const int64_t plane = int64_t(args.height) * args.width;
        auto* first = static_cast<uint16_t*>(args.scratch) + job.index * plane * (packed ? 2 : 3);
        planes = {first, first + plane, first + 2 * plane, args.width, 1};
        pixels = reinterpret_cast<uint32_t*>(first);
    }
    __device__ void put(int y, int x, const Rgb& p) const {
        const int at = planes.at(y, x);
        if constexpr (packed) {
            pixels[at] = to_bits(p.r, 2047) | to_bits(p.g, 2047) << 11 | to_bits(p.b, 1023) << 22;
        } else {
            planes.r[at] = to_16_bits(p.r);
            planes.g[at] = to_16_bits(p.g);
            planes.b[at] = to_16_bits(p.b);
        }
    }
    __device__ Rgb get(int y, int x) const {
        const int at = planes.at(y, x);
        if constexpr (packed) {
            const uint32_t bits = pixels[at];
            return {from_bits(bits & 2047) * (1 / 2047.f),
                    from_bits(bits >> 11 & 2047) * (1 / 2047.f),
                    from_bits(bits >> 22) * (1 / 1023.f)};
        } else {
            return {from_16_bits(planes.r[at]), from_16_bits(planes.g[at]),
                    from_16_bits(planes.b[at])};
        }
    }
};

// A view of one image.
template <class T>
__device__ inline Planes<T> planes_of(const GpuViews& views, int view, int image) {
    const int64_t* stride = views.stride;
    T* first = static_cast<T*>(views.data) + view * stride[0] + image * stride[1];
    return {first, first + stride[2], first + 2 * stride[2], int(stride[3]), int(stride[4])};
}

template <class T>
__device__ inline void put_pixel(const Planes<T>& view, const GpuViews& views, int y, int x,
                                 const Rgb& p) {
    const int at = view.at(y, x);
    put(view.r + at, p.r * views.scale[0] + views.shift[0]);
    put(view.g + at, p.g * views.scale[1] + views.shift[1]);
    put(view.b + at, p.b * views.scale[2] + views.shift[2]);
}

// --------------------------------------------------------------------------------------- colours

// The adjustments of a jitter that change anything, in their order; worked out once for a block.
struct Jitter {
    int count, contrast_at;  // steps; the one at which the mean gray is needed
    int op[4];               // 0 brightness, 1 contrast, 2 saturation, 3 hue
    float amount[4];         // a factor; of hue sixths of a circle, in [0, 6)
};

__device__ inline void set_jitter(Jitter& j, float order, float brightness, float contrast,
                                  float saturation, float hue) {
    j.count = 0;
    for (int step = 0; step < 4; ++step) {
        const int op = jitter_op(int(order), step);
        const float factor = op == 0 ? brightness : op == 1 ? contrast : saturation;
        const float amount = op == 3 ? 6 * (hue - floorf(hue)) : factor;
        if (op == 1) j.contrast_at = j.count;
        if (amount == (op == 3 ? 0 : 1)) continue;
        j.op[j.count] = op;
        j.amount[j.count++] = amount;
    }
}

__device__ inline void set_jitter_of_view(Jitter& j, const ViewParams& p) {
    set_jitter(j, p.jitter_order, p.brightness, p.contrast, p.saturation, p.hue);
}

__device__ inline void set_jitter_of_patch(Jitter& j, const ViewParams& p) {
    set_jitter(j, p.patch_jitter_order, p.patch_brightness, p.patch_contrast, p.patch_saturation,
               p.patch_hue);
}

// Steps first..last-1 on some pixels at once; all threads take the same branches.
template <int n>
__device__ inline void adjust(Rgb (&pixels)[n], const Jitter& j, int first, int last, float mean) {
#pragma unroll 1
    for (int step = first; step < last; ++step) {
        const int op = j.op[step];
        const float amount = j.amount[step];
        if (op == 3) {
#pragma unroll
            for (Rgb& p : pixels) p = adjust_hue(p, amount);
        } else if (op == 2) {
#pragma unroll
            for (Rgb& p : pixels) p = adjust_saturation(p, amount);
        } else {
            const float rest = op == 1 ? (1 - amount) * mean : 0;
#pragma unroll
            for (Rgb& p : pixels)
                p = {adjust_contrast(p.r, amount, rest), adjust_contrast(p.g, amount, rest),
                     adjust_contrast(p.b, amount, rest)};
        }
    }
}

// Sums over a warp and over a block, in an order that is always the same.
__device__ inline float warp_sum(float v) {
#pragma unroll
    for (int bit = warp_size / 2; bit > 0; bit /= 2) v += __shfl_xor_sync(all_lanes, v, bit);
    return v;
}

__device__ inline float block_sum(float v) {
    __shared__ float part[warps];
    v = warp_sum(v);
    if (threadIdx.x % warp_size == 0) part[threadIdx.x / warp_size] = v;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (float its : part) sum += its;
    return sum;
}

// Adjusts a thread's pixels up to contrast, keeps them, and leaves the tile's sum of gray.
template <bool packed>
__device__ inline void keep_up_to_contrast(const GpuRoundArgs& args, const Job& job,
                                           const Jitter& colors, Rgb (&pixels)[pixels_each]) {
    const KeptPixels<packed> kept(args, job);
    adjust(pixels, colors, 0, colors.contrast_at, 0);
    float sum = 0;
    for_pixels(args, job, [&](int i, int y, int x) {
        kept.put(y, x, pixels[i]);
        sum += gray(pixels[i].r, pixels[i].g, pixels[i].b);
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0)
        args.sums[job.index * args.tiles + blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

}  // namespace
}  // namespace spd
