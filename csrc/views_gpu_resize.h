// The kernels of augment_views.cu that crop, resize, flip, and adjust colours up to contrast.
#pragma once

#include <type_traits>

#include "views_gpu.h"

namespace spd {
namespace {

constexpr int chunk = 32, chunk_each = chunk / warps;  // source rows at a time

// Bytes are taken as 2^15 + byte: what that adds, as the weights sum to 1 / 255.
constexpr float under_bytes = -32768 / 255.f;

// What one output reads along an axis; the weights are not normalised yet.
struct Axis {
    float scale, support, slope;
    int in, taps;

    __device__ float centre(int i) const { return (i + 0.5f) * scale; }
    __device__ int first(float centre) const { return first_tap(centre, support, in, taps); }
};

__device__ inline Axis axis_of(int in, int out) {
    const float scale = float(in) / out, support = max2(1.f, scale);
    return {scale, support, 1 / support, in, most_taps(in, out)};
}

__global__ void __launch_bounds__(threads, 2) resize_kernel(const GpuRoundArgs args) {
    __shared__ float line[chunk][3][tile_x];  // source rows, resized along the row
    __shared__ Axis axes[2];                  // down and across
    __shared__ Jitter colors;
    const Job job = job_of(args);
    const ViewParams& p = row_of(args, job);
    const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    if (threadIdx.x == 0) set_jitter_of_view(colors, p);
    if (threadIdx.x < 2)
        axes[threadIdx.x] = threadIdx.x ? axis_of(int(p.crop_width), args.width)
                                        : axis_of(int(p.crop_height), args.height);
    __syncthreads();
    const int64_t* image = args.images + 3 * int64_t(job.image);
    const int pitch = 3 * int(image[2]);
    const uint8_t* corner =
        args.pixels + image[0] + int(p.crop_top) * int64_t(pitch) + 3 * int(p.crop_left);

    // Threads past the view's end do as its last pixel does. Flipping commutes with all that comes
    // before the patch.
    const Axis &down = axes[0], &across = axes[1];
    int first[columns_each];
    float distance[columns_each], gain[columns_each] = {};  // from the first tap to the centre
#pragma unroll
    for (int c = 0; c < columns_each; ++c) {
        const int x = min2(job.column + c * warp_size, args.width - 1);
        const float centre = across.centre(p.flip != 0 ? args.width - 1 - x : x);
        first[c] = across.first(centre);
        distance[c] = first[c] + 0.5f - centre;
    }
#pragma unroll 1
    for (int k = 0; k < across.taps; ++k)
#pragma unroll
        for (int c = 0; c < columns_each; ++c) gain[c] += triangle(distance[c] + k, across.slope);
#pragma unroll
    for (int c = 0; c < columns_each; ++c) gain[c] = 1 / (255 * gain[c]);
    const auto first_row = [&](int y) { return down.first(down.centre(min2(y, args.height - 1))); };
    const int begin = first_row(job.top), end = first_row(job.top + tile_y - 1) + down.taps;
    const uint8_t* from[chunk_each][columns_each];
#pragma unroll
    for (int i = 0; i < chunk_each; ++i)
#pragma unroll
        for (int c = 0; c < columns_each; ++c)
            from[i][c] = corner + (begin + warp + i * warps) * int64_t(pitch) + 3 * first[c];

    Rgb pixels[pixels_each] = {};
    float sum_y[rows_each] = {};
#pragma unroll 1
    for (int start = begin; start < end; start += chunk) {
        const int rows = min2(chunk, end - start), its_rows = (rows - warp + warps - 1) / warps;
        Rgb filtered[chunk_each][columns_each];
#pragma unroll
        for (int i = 0; i < chunk_each; ++i)
#pragma unroll
            for (int c = 0; c < columns_each; ++c)
                filtered[i][c] = {under_bytes, under_bytes, under_bytes};
#pragma unroll 1
        for (int k = 0; k < across.taps; ++k) {
            float w[columns_each];
#pragma unroll
            for (int c = 0; c < columns_each; ++c)
                w[c] = triangle(distance[c] + k, across.slope) * gain[c];
#pragma unroll
            for (int i = 0; i < chunk_each; ++i)
                if (i < its_rows)
#pragma unroll
                    for (int c = 0; c < columns_each; ++c) {
                        filtered[i][c].r += w[c] * over_byte(from[i][c][0]);
                        filtered[i][c].g += w[c] * over_byte(from[i][c][1]);
                        filtered[i][c].b += w[c] * over_byte(from[i][c][2]);
                        from[i][c] += 3;
                    }
        }
        const int64_t next = chunk * int64_t(pitch) - 3 * across.taps;
#pragma unroll
        for (int i = 0; i < chunk_each; ++i)
#pragma unroll
            for (int c = 0; c < columns_each; ++c) {
                from[i][c] += next;
                float* to = &line[warp + i * warps][0][lane + c * warp_size];
                to[0] = filtered[i][c].r;
                to[tile_x] = filtered[i][c].g;
                to[2 * tile_x] = filtered[i][c].b;
            }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < rows_each; ++i) {
            const float centre = down.centre(min2(job.row + i, args.height - 1));
            const int top = down.first(centre), stop = min2(top + down.taps, start + rows);
#pragma unroll 1
            for (int y = max2(top, start); y < stop; ++y) {
                const float w = triangle(y + 0.5f - centre, down.slope);
                sum_y[i] += w;
#pragma unroll
                for (int c = 0; c < columns_each; ++c) {
                    const float* its = &line[y - start][0][lane + c * warp_size];
                    Rgb& sum = pixels[i * columns_each + c];
                    sum.r += w * its[0];
                    sum.g += w * its[tile_x];
                    sum.b += w * its[2 * tile_x];
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < pixels_each; ++i) {
        const float normalise = 1 / sum_y[i / columns_each];
        Rgb& q = pixels[i];
        q = {clamp01(q.r * normalise), clamp01(q.g * normalise), clamp01(q.b * normalise)};
    }
    keep_up_to_contrast<false>(args, job, colors, pixels);
}

// A row of a finished view, resized along the row to the columns of a thread.
template <class T>
struct ViewRow {
    Rgb pixels[columns_each];

    __device__ void read(const Planes<const T>& view, uint32_t row,
                         const uint32_t (&near_at)[columns_each],
                         const uint32_t (&far_at)[columns_each],
                         const float (&weight)[columns_each]) {
        const auto between = [&](const T* plane, int c) {
            const float a = value_of(plane[row + near_at[c]]);
            return a + weight[c] * (value_of(plane[row + far_at[c]]) - a);
        };
#pragma unroll
        for (int c = 0; c < columns_each; ++c)
            pixels[c] = {between(view.r, c), between(view.g, c), between(view.b, c)};
    }
};

// From finished views. A crop of a view is never larger than a view: two taps are enough.
template <class T>
__global__ void __launch_bounds__(threads, 3) resize_view_kernel(const GpuRoundArgs args) {
    __shared__ Jitter colors;
    const Job job = job_of(args);
    const ViewParams& p = row_of(args, job);
    if (threadIdx.x == 0) set_jitter_of_view(colors, p);
    __syncthreads();
    const auto view = planes_of<const T>(args.source, int(p.source), job.image);
    const uint32_t corner = view.at(int(p.crop_top), int(p.crop_left));
    const int crop_height = int(p.crop_height), crop_width = int(p.crop_width);
    uint32_t near_at[columns_each], far_at[columns_each];
    float weight[columns_each];
#pragma unroll
    for (int c = 0; c < columns_each; ++c) {
        const int x = min2(job.column + c * warp_size, args.width - 1);
        const float x_in =
            ((p.flip != 0 ? args.width - 1 - x : x) + 0.5f) * (p.crop_width / args.width) - 0.5f;
        const int left = int(floorf(x_in));
        near_at[c] = corner + max2(left, 0) * view.across;
        far_at[c] = corner + min2(left + 1, crop_width - 1) * view.across;
        weight[c] = x_in - left;
    }
    float gain[3], offset[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        gain[i] = 1 / args.source.scale[i];
        offset[i] = -args.source.shift[i] * gain[i];
    }
    // Neighbouring output rows often read one and the same source row: it is kept. The first
    // output row reads two, the others none or one, as a crop is not higher than the view.
    ViewRow<T> above, below = {};
    int held = 0;  // the source row that `below` is
    const float scale = p.crop_height / args.height;
    Rgb pixels[pixels_each];
#pragma unroll
    for (int i = 0; i < rows_each; ++i) {
        const float y_in = (min2(job.row + i, args.height - 1) + 0.5f) * scale - 0.5f;
        const int top = int(floorf(y_in));
        if (i == 0) held = top - 1;
#pragma unroll 1
        while (held <= top) {
            above = below;
            const int row = min2(max2(++held, 0), crop_height - 1);
            below.read(view, row * view.down, near_at, far_at, weight);
        }
        const float w = y_in - top;
#pragma unroll
        for (int c = 0; c < columns_each; ++c) {
            const Rgb &a = above.pixels[c], &b = below.pixels[c];
            pixels[i * columns_each + c] = {clamp01((a.r + w * (b.r - a.r)) * gain[0] + offset[0]),
                                            clamp01((a.g + w * (b.g - a.g)) * gain[1] + offset[1]),
                                            clamp01((a.b + w * (b.b - a.b)) * gain[2] + offset[2])};
        }
    }
    keep_up_to_contrast<!std::is_same_v<T, float>>(args, job, colors, pixels);
}

}  // namespace
}  // namespace spd
