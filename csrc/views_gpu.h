// What the kernels of augment_views.cu share: which pixels a thread makes, how pixels lie in memory
// between launches and in the end, and their colours.
#pragma once

#include "augment_views.h"
#include "cuda.h"

namespace spd {
namespace {

// A block makes tile_y rows of a view, and each of its warps 16 x 16 pixels at a time. They lie in
// the warp's lanes as two results of multiply_add do, side by side: a lane has four pairs of
// neighbours.
constexpr int tile_y = view_tile_y, tile_x = 32, threads = 256, warps = 8;
constexpr int side = 16, pixels_each = 8, blocks_y = tile_y / side, blocks_x = tile_x / side;
static_assert(blocks_y * blocks_x == warps && threads == warps * warp_size);

struct Job {
    unsigned index;  // of all views that the round makes
    int image, view;
    int tile;
    int warp;         // of the block; one that all of a warp's lanes know
    int top, left;    // the block's first row, and its tile's first column
    int row, column;  // the thread's first pixel
    int room;         // rows and columns of the view from the warp's first pixel on, the fewer

    __device__ bool inside() const { return room > 0; }
    __device__ int block_y() const { return warp / blocks_x; }
    __device__ int block_x() const { return warp % blocks_x; }
};

// n / d, of which `inverse` is 2^31 / d, rounded up: quicker than to divide, and exact up to n d of
// 2^31.
constexpr int64_t most_divided = 1 << 27;  // by 16, the most views of an image and tiles of a view
__device__ inline unsigned divided(unsigned n, unsigned inverse) {
    return __umulhi(2 * n, inverse);
}
inline unsigned inverse_of(unsigned d) { return ((1u << 31) + d - 1) / d; }

// Of a view that the round makes.
__device__ inline Job job_of(const GpuRoundArgs& args, unsigned index) {
    const unsigned image = divided(index, args.per_image);
    Job job{};
    job.index = index;
    job.image = int(image);
    job.view = args.view[index - image * args.views_made];
    // With an exchange the compiler knows that all lanes take the same branches.
    job.warp = __shfl_sync(all_lanes, threadIdx.x / warp_size, 0);
    return job;
}

// Of a tile's rows, for which there is a block.
__device__ inline Job job_of_rows(const GpuRoundArgs& args) {
    const unsigned index = divided(blockIdx.x, args.per_tile);
    Job job = job_of(args, index);
    job.tile = blockIdx.x - index * args.tiles;
    job.top = job.tile * tile_y;
    return job;
}

// To the warp's 16 x 16 pixels from there on.
__device__ inline void move_to(Job& job, const GpuRoundArgs& args, int row, int column) {
    job.row = row + threadIdx.x % warp_size / 4;
    job.column = column + threadIdx.x % 4 * 2;
    job.room = min2(args.height - row, args.width - column);
}

// Calls f(i, y, x) for those of a thread's pairs, its pixels i and i + 1, that begin in the view.
template <class F>
__device__ inline void for_pairs(const GpuRoundArgs& args, const Job& job, const F& f) {
    const auto for_all = [&](const auto& g) {
#pragma unroll
        for (int i = 0; i < pixels_each; i += 2)
            g(i, job.row + i / 4 * 8, job.column + i / 2 % 2 * 8);
    };
    if (job.room >= side) {
        for_all(f);
    } else {
        for_all([&](int i, int y, int x) {
            if (y < args.height && x < args.width) f(i, y, x);
        });
    }
}

// Where pair i lies, from the thread's first pixel on: from one address on, most of that is known.
__device__ inline int pair_offset(int i, int pitch) { return i / 4 * 8 * pitch + i / 2 % 2 * 8; }

// Calls f(i, y, x) for those of a thread's pixels that are in the view: less code, but slower.
template <class F>
__device__ inline void for_pixels(const GpuRoundArgs& args, const Job& job, const F& f) {
#pragma unroll
    for (int i = 0; i < pixels_each; ++i) {
        const int y = job.row + i / 4 * 8, x = job.column + i / 2 % 2 * 8 + i % 2;
        if (y < args.height && x < args.width) f(i, y, x);
    }
}

// As reflect, where one reflection is enough: -n < i < 2 n - 1.
__device__ inline int mirrored_once(int i, int n) {
    const int place = i < 0 ? -i : i;
    return min2(place, 2 * n - 2 - place);
}

// As reflect, but quick in that case.
__device__ inline int mirrored(int i, int n) {
    int place = mirrored_once(i, n);
    if (place < 0) place = reflect(i, n);
    return place;
}

// The three planes of a view, or of what is kept of one. Offsets in a plane fit into 32 bits, and
// take fewer instructions than addresses do.
template <class T>
struct Planes {
    T *r, *g, *b;
    int down, across;  // from row to row and column to column, in elements

    __device__ unsigned at(int y, int x) const { return y * down + x * across; }
    __device__ T* channel(int c) const { return c == 0 ? r : c == 1 ? g : b; }
};

__device__ inline const ViewParams& row_of(const GpuRoundArgs& args, const Job& job) {
    return args.params[int64_t(job.image) * args.views + job.view];
}

// ---------------------------------------------------------------------------- pixels in memory

__device__ inline uint8_t byte_of(float v) {
    return uint8_t(int(min2(max2(v, 0.f), 255.f) + 0.5f));
}
__device__ inline void put(float* to, float v) { *to = v; }
__device__ inline void put(Half* to, float v) { to->bits = to_half(v); }
__device__ inline void put(Bfloat* to, float v) { to->bits = to_bfloat16(v); }
__device__ inline void put(uint8_t* to, float v) { *to = byte_of(v); }

// Two neighbours, where they are aligned as one.
__device__ inline void put_two(float* to, float v, float w) {
    *reinterpret_cast<float2*>(to) = {v, w};
}
__device__ inline void put_two(Half* to, float v, float w) {
    *reinterpret_cast<uint32_t*>(to) = to_halves(v, w);
}
__device__ inline void put_two(Bfloat* to, float v, float w) {
    *reinterpret_cast<uint32_t*>(to) = to_bfloat16(v) | uint32_t(to_bfloat16(w)) << 16;
}
__device__ inline void put_two(uint8_t* to, float v, float w) {
    *reinterpret_cast<uint16_t*>(to) = uint16_t(byte_of(v) | byte_of(w) << 8);
}

// Bits < 2^23 become the mantissa of 2^23 + bits, and back: converting integers takes four times as
// long as adding floats. Rounded once, so that bits of zero give exactly zero.
constexpr float two_23 = 8388608.f;
__device__ inline float from_bits(uint32_t bits, float scale) {
    return fmaf(float_of(bits | 0x4b000000), scale, -two_23 * scale);
}
// Of values in [0, 1]. As the most is a power of two, one multiplication and addition is exact.
constexpr float most_16 = 32768;
__device__ inline uint32_t two_16_bits(float low, float high) {
    return __byte_perm(bits_of(low * most_16 + two_23), bits_of(high * most_16 + two_23), 0x5410);
}
__device__ inline float from_16_bits(uint32_t bits) { return from_bits(bits, 1 / most_16); }

// The views of a round between launches: three planes of 16 bits, or packed into 11, 11 and 10.
// Rows have room for an even number, so that a pair is read and written at once.
template <bool packed>
struct KeptPixels {
    Planes<uint16_t> planes;
    uint32_t* pixels;

    __device__ KeptPixels(const GpuRoundArgs& args, const Job& job) {
        const int pitch = args.width + args.width % 2;
        const int64_t plane = int64_t(args.height) * pitch;
        auto* first = static_cast<uint16_t*>(args.scratch) + plane * (packed ? 2 : 3) * job.index;
        planes = {first, first + plane, first + 2 * plane, pitch, 1};
        pixels = reinterpret_cast<uint32_t*>(first);
    }
    __device__ KeptPixels from_column(int x) const {
        KeptPixels its = *this;
        its.planes.r += x, its.planes.g += x, its.planes.b += x, its.pixels += x;
        return its;
    }
    __device__ Rgb get(int y) const {
        const unsigned at = y * planes.down;
        if constexpr (packed) {
            return unpacked(pixels[at]);
        } else {
            return {from_16_bits(planes.r[at]), from_16_bits(planes.g[at]),
                    from_16_bits(planes.b[at])};
        }
    }
    // All of a thread's pixels.
    __device__ void put(const GpuRoundArgs& args, const Job& job,
                        const Rgb (&from)[pixels_each]) const {
        const unsigned first = planes.at(job.row, job.column);
        uint16_t *r = planes.r + first, *g = planes.g + first, *b = planes.b + first;
        for_pairs(args, job, [&](int i, int, int) {
            const Rgb &p = from[i], &q = from[i + 1];
            const int at = pair_offset(i, planes.down);
            if constexpr (packed) {
                *reinterpret_cast<uint2*>(pixels + first + at) = {packed_bits(p), packed_bits(q)};
            } else {
                pair_at(r + at) = two_16_bits(p.r, q.r);
                pair_at(g + at) = two_16_bits(p.g, q.g);
                pair_at(b + at) = two_16_bits(p.b, q.b);
            }
        });
    }
    __device__ void get(const GpuRoundArgs& args, const Job& job, Rgb (&to)[pixels_each]) const {
        const unsigned first = planes.at(job.row, job.column);
        uint16_t *r = planes.r + first, *g = planes.g + first, *b = planes.b + first;
        for_pairs(args, job, [&](int i, int, int) {
            Rgb &p = to[i], &q = to[i + 1];
            const int at = pair_offset(i, planes.down);
            if constexpr (packed) {
                const auto bits = *reinterpret_cast<const uint2*>(pixels + first + at);
                p = unpacked(bits.x), q = unpacked(bits.y);
            } else {
                const uint32_t rs = pair_at(r + at), gs = pair_at(g + at), bs = pair_at(b + at);
                p = {from_16_bits(rs & 0xffff), from_16_bits(gs & 0xffff),
                     from_16_bits(bs & 0xffff)};
                q = {from_16_bits(rs >> 16), from_16_bits(gs >> 16), from_16_bits(bs >> 16)};
            }
        });
    }

  private:
    __device__ static uint32_t& pair_at(uint16_t* two) { return *reinterpret_cast<uint32_t*>(two); }
    // Shifted out, or added to 2^10 which is, are the bits that stand for 2^23.
    __device__ static uint32_t packed_bits(const Rgb& p) {
        constexpr float rest = 1024 - (0x4b000000 >> 22);
        return bits_of(p.r * 2047 + two_23) + (bits_of(p.g * 2047 + two_23) << 11) +
               (bits_of(p.b * 1023 + (two_23 + rest)) << 22);
    }
    __device__ static Rgb unpacked(uint32_t bits) {
        return {from_bits(bits & 2047, 1 / 2047.f), from_bits(bits & 2047 << 11, 1 / 2047.f / 2048),
                from_bits(bits >> 22, 1 / 1023.f)};
    }
};

// A view of one image.
template <class T>
__device__ inline Planes<T> planes_of(const GpuViews& views, int view, int image) {
    const int64_t* stride = views.stride;
    T* first = static_cast<T*>(views.data) + view * stride[0] + image * stride[1];
    return {first, first + stride[2], first + 2 * stride[2], int(stride[3]), int(stride[4])};
}

// A channel of a thread's pixels, scale * values + shift: a view's own scale and shift are worked
// into these, for one multiplication and addition a pixel.
struct Scaled {
    const float (&values)[pixels_each];
    float scale, shift;

    __device__ float operator[](int i) const { return values[i] * scale + shift; }
};

// As a view stores it.
__device__ inline Scaled as_stored(const GpuViews& views, int channel, const Scaled& pixels) {
    const float scale = views.scale[channel];
    return {pixels.values, pixels.scale * scale, pixels.shift * scale + views.shift[channel]};
}

// One of them, to its plane of a view.
template <class T>
__device__ inline void put_channel(const GpuRoundArgs& args, const Job& job, const GpuViews& views,
                                   T* plane, int channel, const Scaled& pixels) {
    const int down = int(views.stride[3]), across = int(views.stride[4]);
    const Scaled stored = as_stored(views, channel, pixels);
    if (views.together > 1) {
        T* first = plane + unsigned(job.row * down + job.column);
        for_pairs(args, job, [&](int i, int, int) {
            put_two(first + pair_offset(i, down), stored[i], stored[i + 1]);
        });
    } else {
        for_pixels(args, job, [&](int i, int y, int x) {
            put(plane + unsigned(y * down + x * across), stored[i]);
        });
    }
}

// To a view whose channels lie side by side: a pair is three times two neighbours. Called for one
// channel after the other; they are put as soon as they are there, for registers are scarce.
template <class T>
__device__ inline void put_interleaved(const GpuRoundArgs& args, const Job& job, T* view, int down,
                                       int channel, const float (&stored)[3][pixels_each]) {
    if (channel == 0) return;
    T* first = view + unsigned(job.row * down + 3 * job.column);
    for_pairs(args, job, [&](int i, int, int) {
        T* to = first + i / 4 * 8 * down + i / 2 % 2 * 8 * 3;
        if (channel == 1) {
            put_two(to, stored[0][i], stored[1][i]);
        } else {
            put_two(to + 2, stored[2][i], stored[0][i + 1]);
            put_two(to + 4, stored[1][i + 1], stored[2][i + 1]);
        }
    });
}

// --------------------------------------------------------------------------------------- colours

// The adjustments of a jitter that change anything, in their order, and grayscale; worked out once
// for a block.
struct Jitter {
    int count, contrast_at;  // steps; the one at which the mean gray is needed
    int op[5];               // 0 brightness, 1 contrast, 2 saturation, 3 hue, 4 to gray
    float amount[5];         // a factor; of hue sixths of a circle, in [0, 6)
    float rest[5];           // that brightness and contrast add: see set_mean
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
        j.rest[j.count] = 0;
        j.amount[j.count++] = amount;
    }
}

__device__ inline void set_jitter_of_view(Jitter& j, const ViewParams& p) {
    set_jitter(j, p.jitter_order, p.brightness, p.contrast, p.saturation, p.hue);
    if (p.grayscale != 0) j.op[j.count++] = 4;
}

__device__ inline void set_jitter_of_patch(Jitter& j, const ViewParams& p) {
    set_jitter(j, p.patch_jitter_order, p.patch_brightness, p.patch_contrast, p.patch_saturation,
               p.patch_hue);
}

// The mean gray of what has been adjusted up to contrast.
__device__ inline void set_mean(Jitter& j, float mean) {
    if (j.contrast_at < j.count && j.op[j.contrast_at] == 1)
        j.rest[j.contrast_at] = (1 - j.amount[j.contrast_at]) * mean;
}

// Steps first..last-1 on some pixels at once; all threads take the same branches.
template <int n>
__device__ inline void adjust(Rgb (&pixels)[n], const Jitter& j, int first, int last) {
#pragma unroll 1
    for (int step = first; step < last; ++step) {
        const int op = j.op[step];
        const float amount = j.amount[step], rest = j.rest[step];
        if (op == 3) {
#pragma unroll
            for (Rgb& p : pixels) p = adjust_hue(p, amount);
        } else if (op == 2) {
#pragma unroll
            for (Rgb& p : pixels) p = adjust_saturation(p, amount);
        } else if (op == 4) {
#pragma unroll
            for (Rgb& p : pixels) p.r = p.g = p.b = gray(p.r, p.g, p.b);
        } else {
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

// Once in a kernel: nothing waits before `part` is written again.
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

// Leaves the sum of gray of what the block makes; `sum` is the thread's part of it.
__device__ inline void keep_sum(const GpuRoundArgs& args, const Job& job, float sum) {
    const float total = block_sum(sum);
    if (threadIdx.x == 0) args.sums[int64_t(job.index) * args.tiles + job.tile] = total;
}

}  // namespace
}  // namespace spd
