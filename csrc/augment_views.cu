// augment_views on a GPU: a block of threads makes a tile of one view. A round makes the views
// whose sources exist: those of the decoded images first, then those made from them.
//
// resize (or resize_view) crops, resizes, flips and adjusts colours up to contrast, which needs the
// mean of the whole view: every block leaves its part of that sum. finish does the rest, blurs,
// normalises and stores; paste blends patches in. Between launches pixels are kept in 16 bits, or
// packed into 11, 11 and 10. Both filters are two passes through shared memory, one for each axis;
// the blur's are products with band matrices.

#include <type_traits>

#include "views_gpu.h"
#include "views_gpu_blur.h"
#include "views_gpu_resize.h"

namespace spd {
namespace {

// -------------------------------------------------------------------------------------- the rest

__device__ inline void to_gray(Rgb& p) {
    const float level = gray(p.r, p.g, p.b);
    p = {level, level, level};
}

// The tile's pixels and those around it, adjusted from contrast on, and blurred.
template <bool packed>
__device__ inline void make_blurred(Rgb (&pixels)[pixels_each], const GpuRoundArgs& args,
                                    const Job& job, const Jitter& colors, float mean,
                                    bool grayscale, const Blur& blur, uint16_t* shared) {
    const KeptPixels<packed> kept(args, job);
    const BlurMemory memory(shared, blur);
    constexpr int together = 3;  // pixels: a row of what is held, of most views
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
#pragma unroll 1
    for (int x = lane; x < memory.width; x += together * warp_size) {
        int columns[together];
#pragma unroll
        for (int i = 0; i < together; ++i)
            columns[i] = mirrored(job.left - blur.radius + x + i * warp_size, args.width);
#pragma unroll 1
        for (int y = warp; y < memory.rows; y += warps) {
            Rgb q[together] = {};
            // What is held past what is read meets taps of zero, but must be a number.
            if (y < tile_y + 2 * blur.radius) {
                const int row = mirrored(job.top - blur.radius + y, args.height);
#pragma unroll
                for (int i = 0; i < together; ++i) q[i] = kept.get(row, columns[i]);
                adjust(q, colors, colors.contrast_at, colors.count, mean);
                if (grayscale)
#pragma unroll
                    for (Rgb& its : q) to_gray(its);
            }
#pragma unroll
            for (int i = 0; i < together; ++i)
                if (x + i * warp_size < memory.width) {
                    uint16_t* to = &memory.pixel(0, y, x + i * warp_size);
                    to[0] = to_half(q[i].r - 0.5f);
                    to[memory.rows * memory.width] = to_half(q[i].g - 0.5f);
                    to[2 * memory.rows * memory.width] = to_half(q[i].b - 0.5f);
                }
        }
    }
    __syncthreads();
    for (int channel = 0; channel < 3; ++channel) blur_channel(memory, blur, channel);
    const int first = (job.row - job.top) * tile_x + lane;
    const auto blurred = [&](int channel, int i) {
        const int at = first + i / columns_each * tile_x + i % columns_each * warp_size;
        return from_16_bits((&memory.pixel(channel, 0, 0))[at]);
    };
#pragma unroll
    for (int i = 0; i < pixels_each; ++i) pixels[i] = {blurred(0, i), blurred(1, i), blurred(2, i)};
}

template <class T, bool packed>
__global__ void __launch_bounds__(threads, 3) finish_kernel(const GpuRoundArgs args) {
    SPD_DYNAMIC_SHARED(uint16_t, shared);
    __shared__ Jitter colors;
    const Job job = job_of(args);
    const ViewParams& p = row_of(args, job);
    if (threadIdx.x == 0) set_jitter_of_view(colors, p);
    float mean = 0;
    const float* sums = args.sums + job.index * args.tiles;
    const int lane = threadIdx.x % warp_size;
#pragma unroll 1
    for (int i = lane; i < args.tiles; i += warp_size) mean += sums[i];
    mean = warp_sum(mean) / (args.height * args.width);
    const Blur of_view(p.blur_sigma, args.height);
    const bool grayscale = p.grayscale != 0;
    __syncthreads();

    Rgb pixels[pixels_each] = {};
    if (of_view.radius > 0) {
        make_blurred<packed>(pixels, args, job, colors, mean, grayscale, of_view, shared);
    } else {
        const KeptPixels<packed> kept(args, job);
        for_pixels(args, job, [&](int i, int y, int x) { pixels[i] = kept.get(y, x); });
        adjust(pixels, colors, colors.contrast_at, colors.count, mean);
        if (grayscale)
#pragma unroll
            for (Rgb& q : pixels) to_gray(q);
    }

    const auto view = planes_of<T>(args.target, job.view, job.image);
    for_pixels(args, job,
               [&](int i, int y, int x) { put_pixel(view, args.target, y, x, pixels[i]); });
    if (job.view < args.fine.count) {
        const auto fine = planes_of<Half>(args.fine, job.view, job.image);
        for_pixels(args, job,
                   [&](int i, int y, int x) { put_pixel(fine, args.fine, y, x, pixels[i]); });
    }
    if (int(p.patch_kind) == no_patch) return;
    // The patch's source box, which `paste` may overwrite.
    const int top = int(p.patch_top), left = int(p.patch_left), width = int(p.patch_width);
    for_pixels(args, job, [&](int i, int y, int x) {
        const int row = y - top, column = x - left, at = row * width + column;
        if (row < 0 || row >= int(p.patch_height) || column < 0 || column >= width ||
            at >= args.room)
            return;
        float* to = args.boxes + 3 * job.index * args.room + at;
        to[0] = pixels[i].r, to[args.room] = pixels[i].g, to[2 * args.room] = pixels[i].b;
    });
}

// ------------------------------------------------------------------------------------- the patch

// The blurred interval [start, start + length) of an axis of n pixels, at place i.
__device__ inline float alpha_along(int i, int start, int length, float sigma, int n) {
    const int radius = sigma > 0 ? alpha_radius(sigma) : 0;
    float inside = 0, total = 0;
#pragma unroll 1
    for (int k = -radius; k <= radius; ++k) {
        const float w = radius > 0 ? gaussian_tap(k, sigma) : 1;
        const int place = mirrored(i + k, n) - start;
        total += w;
        if (place >= 0 && place < length) inside += w;
    }
    return inside / total;
}

// Blends the jittered patch in where alpha is not zero: out = (1 - alpha) out + alpha patch.
template <class T>
__global__ void __launch_bounds__(threads, 3)
    paste_kernel(const GpuRoundArgs args, const GpuViews views) {
    __shared__ Jitter colors;
    __shared__ float a[tile_y], b[tile_x];
    const Job job = job_of(args);
    const ViewParams& p = row_of(args, job);
    const int kind = int(p.patch_kind), height = int(p.patch_height), width = int(p.patch_width);
    const int top = int(p.target_top), left = int(p.target_left);
    const float sigma_y = kind == smooth_blend ? p.alpha_sigma_y : 0;
    const float sigma_x = kind == smooth_blend ? p.alpha_sigma_x : 0;
    const int reach_y = alpha_radius(sigma_y), reach_x = alpha_radius(sigma_x);
    if (kind == no_patch || job.view >= views.count || job.top >= top + height + reach_y ||
        job.top + tile_y <= top - reach_y || job.left >= left + width + reach_x ||
        job.left + tile_x <= left - reach_x)
        return;  // all threads of the block
    if (threadIdx.x == 0) set_jitter_of_patch(colors, p);
    if (threadIdx.x < tile_y)
        a[threadIdx.x] = alpha_along(job.top + threadIdx.x, top, height, sigma_y, args.height);
    if (threadIdx.x < tile_x)
        b[threadIdx.x] = alpha_along(job.left + threadIdx.x, left, width, sigma_x, args.width);
    __syncthreads();

    const float* box = args.boxes + 3 * job.index * args.room;
    const auto pixel = [&](int i) {
        return Rgb{box[i], box[args.room + i], box[2 * args.room + i]};
    };
    const int area = min2(height * width, args.room);
    float mean = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < area; i += threads) {
        Rgb q[1] = {pixel(i)};
        adjust(q, colors, 0, colors.contrast_at, 0);
        mean += gray(q[0].r, q[0].g, q[0].b);
    }
    mean = block_sum(mean) / area;

    Rgb patch[pixels_each] = {};
    const auto for_all = [&](const auto& f) {
        for_pixels(args, job, [&](int i, int y, int x) {
            const int row = y - top, column = x - left, at = row * width + column;
            const bool inside = row >= 0 && row < height && column >= 0 && column < width;
            f(i, y, x, inside && at < args.room ? at : -1);
        });
    };
    for_all([&](int i, int, int, int at) {
        if (at >= 0) patch[i] = pixel(at);
    });
    adjust(patch, colors, 0, colors.count, mean);
    const auto view = planes_of<T>(views, job.view, job.image);
    for_all([&](int i, int y, int x, int at) {
        const float alpha = a[y - job.top] * b[x - job.left];
        const float channel[3] = {patch[i].r, patch[i].g, patch[i].b};
        T* to[3] = {view.r + view.at(y, x), view.g + view.at(y, x), view.b + view.at(y, x)};
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            const float before = (value_of(*to[c]) - views.shift[c]) / views.scale[c];
            const float after = (1 - alpha) * before + (at < 0 ? 0 : alpha * channel[c]);
            put(to[c], after * views.scale[c] + views.shift[c]);
        }
    });
}

// ------------------------------------------------------------------------------------- launching

// Calls f(args, blocks) for as many views at a time as an axis of a launch can have.
template <class F>
void for_jobs(GpuRoundArgs args, const F& f) {
    constexpr int most = 65535;
    const int64_t jobs = int64_t(args.n_images) * args.views_made;
    for (args.first_job = 0; args.first_job < jobs; args.first_job += most)
        f(args, dim3((args.width + tile_x - 1) / tile_x, (args.height + tile_y - 1) / tile_y,
                     min2<int64_t>(most, jobs - args.first_job)));
}

template <class T, bool packed>
void finish(const GpuRoundArgs& all) {
    const int radius = blur_radius(all.height);
    const size_t shared = radius ? BlurMemory::bytes(radius) : 0;
    for_jobs(all, [&](const GpuRoundArgs& args, dim3 blocks) {
        SPD_LAUNCH((finish_kernel<T, packed>), blocks, dim3(threads), shared,
                   static_cast<cudaStream_t>(args.stream), args);
    });
}

template <class T>
void paste(const GpuRoundArgs& all, const GpuViews& views) {
    for_jobs(all, [&](const GpuRoundArgs& args, dim3 blocks) {
        SPD_LAUNCH(paste_kernel<T>, blocks, dim3(threads), 0,
                   static_cast<cudaStream_t>(args.stream), args, views);
    });
}

template <class T>
void finish_and_paste(const GpuRoundArgs& args) {
    if constexpr (!std::is_same_v<T, float>) {
        args.packed ? finish<T, true>(args) : finish<T, false>(args);
    } else {
        finish<T, false>(args);  // what ends as float32 is never packed
    }
    if (args.room) paste<T>(args, args.target);
}

}  // namespace

void augment_round_cuda(const GpuRoundArgs& all) {
    for_jobs(all, [&](const GpuRoundArgs& args, dim3 blocks) {
        const auto stream = static_cast<cudaStream_t>(args.stream);
        if (args.from_images) {
            SPD_LAUNCH(resize_kernel, blocks, dim3(threads), 0, stream, args);
        } else if (args.packed) {
            SPD_LAUNCH(resize_view_kernel<Half>, blocks, dim3(threads), 0, stream, args);
        } else {
            SPD_LAUNCH(resize_view_kernel<float>, blocks, dim3(threads), 0, stream, args);
        }
    });
    switch (all.target.dtype) {
        case DType::float32: finish_and_paste<float>(all); break;
        case DType::float16: finish_and_paste<Half>(all); break;
        case DType::bfloat16: finish_and_paste<Bfloat>(all); break;
        case DType::uint8: finish_and_paste<uint8_t>(all); break;
    }
    if (all.room && all.paste_fine) paste<Half>(all, all.fine);
}

}  // namespace spd
