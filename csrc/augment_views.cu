// augment_views on a GPU: a block of threads makes a tile of one view. A round makes the views
// whose sources exist: those of the decoded images first, then those made from them.
//
// resize (or resize_view) crops, resizes, flips and adjusts colours up to contrast, which needs the
// mean of the whole view: every block leaves its part of that sum. finish does the rest, blurs,
// normalises and stores; paste blends patches in. Between launches pixels are kept in 16 bits, or
// packed into 11, 11 and 10. Both filters are two passes through shared memory, one for each axis.

#include "views_gpu.h"

namespace spd {
namespace {

constexpr int chunk = 32, chunk_each = chunk / groups;  // source rows filtered at a time

// ------------------------------------------------------------------------------------- resizing

// What one output reads along an axis; the weights are not normalised yet.
struct Axis {
    float centre, slope;
    int first, taps;

    __device__ float weight(int k) const { return triangle(k + 0.5f - centre, slope); }
};

__device__ inline Axis axis_of(int i, int in, int out) {
    const float scale = float(in) / out, support = max2(1.f, scale), centre = (i + 0.5f) * scale;
    const int taps = most_taps(in, out);
    return {centre, 1 / support, first_tap(centre, support, in, taps), taps};
}

__global__ void __launch_bounds__(threads, 2) resize_kernel(const GpuRoundArgs args) {
    __shared__ float line[chunk][3][tile_x];  // source rows, resized along the row
    __shared__ Axis down[tile_y];
    __shared__ Adjustments colors;
    const Job job = job_of(args, blockIdx.x / args.tiles);
    const Tile tile = tile_of(args, blockIdx.x % args.tiles);
    const ViewParams& p = row_of(args, job);
    if (threadIdx.x == 0) colors = view_adjustments(p);
    const int64_t* image = args.images + 3 * int64_t(job.image);
    const int64_t pitch = 3 * image[2];
    const int crop_height = int(p.crop_height), column = threadIdx.x % tile_x;
    const int group = threadIdx.x / tile_x, bottom = args.height - 1;
    const uint8_t* corner = args.pixels + image[0] + int(p.crop_top) * pitch + 3 * int(p.crop_left);

    // Threads past the view's end do as its last pixel does. Flipping commutes with all that comes
    // before the patch.
    const int x = min2(tile.x + column, args.width - 1);
    const Axis across =
        axis_of(p.flip != 0 ? args.width - 1 - x : x, int(p.crop_width), args.width);
    float sum_x = 0;
    for (int k = 0; k < across.taps; ++k) sum_x += across.weight(across.first + k);
    const float gain = 1 / (255 * sum_x);
    if (threadIdx.x < tile_y)
        down[threadIdx.x] =
            axis_of(min2(tile.y + int(threadIdx.x), bottom), crop_height, args.height);
    __syncthreads();
    const int begin = down[0].first, end = down[tile_y - 1].first + down[tile_y - 1].taps;

    Rgb sums[rows_each] = {};
    float sum_y[rows_each] = {};
    for (int start = begin; start < end; start += chunk) {
        const int rows = min2(chunk, end - start);
        Rgb filtered[chunk_each] = {};
        for (int k = 0; k < across.taps; ++k) {
            const float w = across.weight(across.first + k) * gain;
            const uint8_t* at = corner + start * pitch + 3 * (across.first + k);
#pragma unroll
            for (int i = 0; i < chunk_each; ++i) {
                const uint8_t* from = at + min2(group + i * groups, rows - 1) * pitch;
                filtered[i].r += w * from_bits(from[0], 1);
                filtered[i].g += w * from_bits(from[1], 1);
                filtered[i].b += w * from_bits(from[2], 1);
            }
        }
#pragma unroll
        for (int i = 0; i < chunk_each; ++i) {
            line[group + i * groups][0][column] = filtered[i].r;
            line[group + i * groups][1][column] = filtered[i].g;
            line[group + i * groups][2][column] = filtered[i].b;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < rows_each; ++i) {
            const Axis axis = down[group * rows_each + i];
            const int stop = min2(axis.first + axis.taps, start + rows);
            for (int y = max2(axis.first, start); y < stop; ++y) {
                const float w = axis.weight(y);
                sum_y[i] += w;
                sums[i].r += w * line[y - start][0][column];
                sums[i].g += w * line[y - start][1][column];
                sums[i].b += w * line[y - start][2][column];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < rows_each; ++i) {
        const float normalise = 1 / sum_y[i];
        sums[i] = {clamp01(sums[i].r * normalise), clamp01(sums[i].g * normalise),
                   clamp01(sums[i].b * normalise)};
    }
    keep_up_to_contrast(args, job, colors, tile, sums);
}

// From finished views. A crop of a view is never larger than a view: two taps are enough.
template <class T>
__global__ void __launch_bounds__(threads, 4) resize_view_kernel(const GpuRoundArgs args) {
    __shared__ Adjustments colors;
    // The views of one tile follow each other, so that the second finds its source in the cache.
    const int64_t of_image = int64_t(args.tiles) * args.views_made;
    const int64_t image = blockIdx.x / of_image, in_image = blockIdx.x % of_image;
    const Job job = job_of(args, image * args.views_made + in_image % args.views_made);
    const Tile tile = tile_of(args, int(in_image / args.views_made));
    const ViewParams& p = row_of(args, job);
    if (threadIdx.x == 0) colors = view_adjustments(p);
    __syncthreads();
    const int64_t* stride = args.source.stride;
    const T* corner = static_cast<const T*>(args.source.data) + int(p.source) * stride[0] +
                      job.image * stride[1] + int(p.crop_top) * stride[3] +
                      int(p.crop_left) * stride[4];
    const int x = tile.x + threadIdx.x % tile_x;
    const auto place = [](int i, float in, int out) { return (i + 0.5f) * (in / out) - 0.5f; };
    const float x_in = place(p.flip != 0 ? args.width - 1 - x : x, p.crop_width, args.width);
    const auto inside = [](float i, float n) { return int(min2(max2(i, 0.f), n - 1)); };
    const int64_t near = inside(floorf(x_in), p.crop_width) * stride[4];
    const int64_t far = inside(floorf(x_in) + 1, p.crop_width) * stride[4];
    const float weight_x = x_in - floorf(x_in);
    Rgb pixels[rows_each] = {};
#pragma unroll
    for (int i = 0; i < rows_each; ++i) {
        const int y = tile.y + threadIdx.x / tile_x * rows_each + i;
        if (y >= args.height || x >= args.width) continue;
        const float y_in = place(y, p.crop_height, args.height);
        const T* above = corner + inside(floorf(y_in), p.crop_height) * stride[3];
        const T* below = corner + inside(floorf(y_in) + 1, p.crop_height) * stride[3];
        const float weight_y = y_in - floorf(y_in);
        float channel[3];
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            const int64_t at = c * stride[2];
            const float a = value_of(above[at + near]), b = value_of(above[at + far]);
            const float d = value_of(below[at + near]), e = value_of(below[at + far]);
            const float upper = a + weight_x * (b - a), lower = d + weight_x * (e - d);
            const float v = upper + weight_y * (lower - upper);
            channel[c] = clamp01((v - args.source.shift[c]) / args.source.scale[c]);
        }
        pixels[i] = {channel[0], channel[1], channel[2]};
    }
    keep_up_to_contrast(args, job, colors, tile, pixels);
}

// -------------------------------------------------------------------------------------- the rest

// What is in the scratch memory, adjusted from contrast on.
__device__ inline Rgb from_contrast(const KeptPixels& scratch, const Job& job, int64_t at,
                                    const Adjustments& colors, float mean, bool grayscale) {
    const Rgb p = jitter(scratch.get(job.index, at), colors, colors.contrast_at, 4, mean);
    const float level = grayscale ? gray(p.r, p.g, p.b) : 0;
    return grayscale ? Rgb{level, level, level} : p;
}

// Blurs the tile's pixels and those around it: down the columns, then along the rows.
__device__ inline void blur(Rgb (&pixels)[rows_each], uint16_t* around, const float* taps,
                            int radius) {
    const int across = tile_x + 2 * radius, down = tile_y + 2 * radius;
    uint16_t* columns = around + 3 * down * across;
    constexpr float unit = 1 / 65535.f;
    for (int e = threadIdx.x; e < 3 * tile_y * across; e += threads) {
        const int channel = e / (tile_y * across), at = e % (tile_y * across);
        const uint16_t* middle = around + channel * down * across + at + radius * across;
        float sum = taps[0] * from_bits(*middle, 1);
        for (int k = 1; k <= radius; ++k)
            sum += taps[k] * from_bits(middle[-k * across] + middle[k * across], 1);
        columns[e] = uint16_t(sum + 0.5f);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < rows_each; ++i) {
        const int y = threadIdx.x / tile_x * rows_each + i;
        float channel[3];
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            const uint16_t* middle =
                columns + (c * tile_y + y) * across + radius + threadIdx.x % tile_x;
            float sum = taps[0] * from_bits(*middle, unit);
            for (int k = 1; k <= radius; ++k)
                sum += taps[k] * from_bits(middle[-k] + middle[k], unit);
            channel[c] = clamp01(sum);
        }
        pixels[i] = {channel[0], channel[1], channel[2]};
    }
}

template <class T>
__global__ void __launch_bounds__(threads, 4) finish_kernel(const GpuRoundArgs args) {
    SPD_DYNAMIC_SHARED(uint16_t, around);
    __shared__ Adjustments colors;
    __shared__ float taps[most_gpu_radius + 1];
    __shared__ int radius;
    const Job job = job_of(args, blockIdx.x / args.tiles);
    const Tile tile = tile_of(args, blockIdx.x % args.tiles);
    const ViewParams& p = row_of(args, job);
    const KeptPixels scratch = scratch_of(args);
    if (threadIdx.x == 0) {
        colors = view_adjustments(p);
        float sum = 0;
        const int most = blur_radius(args.height);
        for (int k = 0; k <= most; ++k) {
            taps[k] = p.blur_sigma > 0 ? gaussian_tap(k, p.blur_sigma) : k == 0;
            sum += k ? 2 * taps[k] : taps[k];
        }
        radius = 0;
        for (int k = 0; k <= most; ++k) {
            taps[k] /= sum;
            if (taps[k] >= negligible_tap) radius = k;
        }
    }
    float mean = 0;
    for (int i = threadIdx.x; i < args.tiles; i += threads)
        mean += args.sums[job.index * args.tiles + i];
    mean = block_sum(mean) / scratch.plane;

    const int x = tile.x + threadIdx.x % tile_x, top = threadIdx.x / tile_x * rows_each;
    const bool grayscale = p.grayscale != 0;
    Rgb pixels[rows_each] = {};
    if (radius > 0) {
        const int across = tile_x + 2 * radius, down = tile_y + 2 * radius;
        for (int e = threadIdx.x; e < down * across; e += threads) {
            const int y = reflect(tile.y - radius + e / across, args.height);
            const int at = reflect(tile.x - radius + e % across, args.width);
            const Rgb q =
                from_contrast(scratch, job, int64_t(y) * args.width + at, colors, mean, grayscale);
            around[e] = uint16_t(to_bits(q.r, 65535));
            around[down * across + e] = uint16_t(to_bits(q.g, 65535));
            around[2 * down * across + e] = uint16_t(to_bits(q.b, 65535));
        }
        __syncthreads();
        blur(pixels, around, taps, radius);
    } else {
#pragma unroll
        for (int i = 0; i < rows_each; ++i)
            if (tile.y + top + i < args.height && x < args.width)
                pixels[i] = from_contrast(scratch, job, int64_t(tile.y + top + i) * args.width + x,
                                          colors, mean, grayscale);
    }

    const GpuViews &target = args.target, &fine = args.fine;
    const int patch_width = int(p.patch_width);
#pragma unroll
    for (int i = 0; i < rows_each; ++i) {
        const int y = tile.y + top + i;
        if (y >= args.height || x >= args.width) continue;
        put_pixel(place_of<T>(target, job, y, x), target, pixels[i]);
        if (job.view < fine.count) put_pixel(place_of<Half>(fine, job, y, x), fine, pixels[i]);
        // The patch's source box, which `paste` may overwrite.
        const int row = y - int(p.patch_top), column = x - int(p.patch_left);
        if (int(p.patch_kind) != no_patch && row >= 0 && row < int(p.patch_height) && column >= 0 &&
            column < patch_width && row * patch_width + column < args.room) {
            float* to = args.boxes + 3 * job.index * args.room + row * patch_width + column;
            to[0] = pixels[i].r, to[args.room] = pixels[i].g, to[2 * args.room] = pixels[i].b;
        }
    }
}

// ------------------------------------------------------------------------------------- the patch

// The blurred interval [start, start + length) of an axis of n pixels, at place i.
__device__ inline float alpha_along(int i, int start, int length, float sigma, int n) {
    const int radius = sigma > 0 ? alpha_radius(sigma) : 0;
    float inside = 0, total = 0;
    for (int k = -radius; k <= radius; ++k) {
        const float w = radius > 0 ? gaussian_tap(k, sigma) : 1;
        const int place = reflect(i + k, n) - start;
        total += w;
        if (place >= 0 && place < length) inside += w;
    }
    return inside / total;
}

// Blends the jittered patch in where alpha is not zero: out = (1 - alpha) out + alpha patch.
template <class T>
__global__ void __launch_bounds__(threads, 4)
    paste_kernel(const GpuRoundArgs args, const GpuViews views) {
    __shared__ Adjustments colors;
    __shared__ float a[tile_y], b[tile_x];
    const Job job = job_of(args, blockIdx.x / args.tiles);
    const Tile tile = tile_of(args, blockIdx.x % args.tiles);
    const ViewParams& p = row_of(args, job);
    const int kind = int(p.patch_kind), height = int(p.patch_height), width = int(p.patch_width);
    const int top = int(p.target_top), left = int(p.target_left);
    const float sigma_y = kind == smooth_blend ? p.alpha_sigma_y : 0;
    const float sigma_x = kind == smooth_blend ? p.alpha_sigma_x : 0;
    const int reach_y = alpha_radius(sigma_y), reach_x = alpha_radius(sigma_x);
    if (kind == no_patch || job.view >= views.count || tile.y >= top + height + reach_y ||
        tile.y + tile_y <= top - reach_y || tile.x >= left + width + reach_x ||
        tile.x + tile_x <= left - reach_x)
        return;  // all threads of the block
    if (threadIdx.x == 0) colors = patch_adjustments(p);
    if (threadIdx.x < tile_y)
        a[threadIdx.x] = alpha_along(tile.y + threadIdx.x, top, height, sigma_y, args.height);
    if (threadIdx.x < tile_x)
        b[threadIdx.x] = alpha_along(tile.x + threadIdx.x, left, width, sigma_x, args.width);
    __syncthreads();

    const float* box = args.boxes + 3 * job.index * args.room;
    const auto pixel = [&](int i) {
        return Rgb{box[i], box[args.room + i], box[2 * args.room + i]};
    };
    const int area = min2(height * width, args.room);
    float mean = 0;
    for (int i = threadIdx.x; i < area; i += threads) {
        const Rgb q = jitter(pixel(i), colors, 0, colors.contrast_at, 0);
        mean += gray(q.r, q.g, q.b);
    }
    mean = block_sum(mean) / area;

    const int column = threadIdx.x % tile_x, x = tile.x + column;
#pragma unroll
    for (int i = 0; i < rows_each; ++i) {
        const int row = threadIdx.x / tile_x * rows_each + i, y = tile.y + row;
        if (y >= args.height || x >= args.width) continue;
        const float alpha = a[row] * b[column];
        const int patch_y = y - top, patch_x = x - left, at = patch_y * width + patch_x;
        const bool inside = patch_y >= 0 && patch_y < height && patch_x >= 0 && patch_x < width;
        Rgb q{0, 0, 0};
        if (inside && at < args.room) q = jitter(pixel(at), colors, 0, 4, mean);
        T* to = place_of<T>(views, job, y, x);
        const float channel[3] = {q.r, q.g, q.b};
#pragma unroll
        for (int c = 0; c < 3; ++c, to += views.stride[2]) {
            const float before = (value_of(*to) - views.shift[c]) / views.scale[c];
            const float after = (1 - alpha) * before + alpha * channel[c];
            put(to, after * views.scale[c] + views.shift[c]);
        }
    }
}

// ------------------------------------------------------------------------------------- launching

template <class T>
void paste(const GpuRoundArgs& args, const GpuViews& views) {
    const dim3 blocks(args.n_images * args.views_made * args.tiles);
    SPD_LAUNCH(paste_kernel<T>, blocks, dim3(threads), 0, static_cast<cudaStream_t>(args.stream),
               args, views);
}

template <class T>
void finish(const GpuRoundArgs& args) {
    const dim3 blocks(args.n_images * args.views_made * args.tiles);
    const size_t radius = blur_radius(args.height), across = tile_x + 2 * radius;
    const size_t around = 3 * (tile_y + 2 * radius + tile_y) * across * sizeof(uint16_t);
    SPD_LAUNCH(finish_kernel<T>, blocks, dim3(threads), radius ? around : 0,
               static_cast<cudaStream_t>(args.stream), args);
    if (args.room) paste<T>(args, args.target);
}

}  // namespace

void augment_round_cuda(const GpuRoundArgs& args) {
    const dim3 blocks(args.n_images * args.views_made * args.tiles);
    const auto stream = static_cast<cudaStream_t>(args.stream);
    if (args.from_images) {
        SPD_LAUNCH(resize_kernel, blocks, dim3(threads), 0, stream, args);
    } else if (args.source.dtype == DType::float32) {
        SPD_LAUNCH(resize_view_kernel<float>, blocks, dim3(threads), 0, stream, args);
    } else {
        SPD_LAUNCH(resize_view_kernel<Half>, blocks, dim3(threads), 0, stream, args);
    }
    switch (args.target.dtype) {
        case DType::float32: finish<float>(args); break;
        case DType::float16: finish<Half>(args); break;
        case DType::bfloat16: finish<Bfloat>(args); break;
        case DType::uint8: finish<uint8_t>(args); break;
    }
    if (args.room && args.paste_fine) paste<Half>(args, args.fine);
}

}  // namespace spd
