// augment_views on a GPU: a block of threads makes some rows of one view. A round makes the views
// whose sources exist: those of the decoded images first, then those made from them.
//
// resize (or resize_view) crops, resizes, flips and adjusts colours up to contrast, which needs the
// mean of the whole view: every block leaves its part of that sum. finish does the rest, blurs,
// normalises and stores; paste blends patches in. Between launches pixels are kept in 16 bits, or
// packed into 11, 11 and 10. Both filters are two products with band matrices, on tensor cores.

#include <stdexcept>
#include <type_traits>

#include "views_gpu.h"
#include "views_gpu_blur.h"
#include "views_gpu_resize.h"

namespace spd {
namespace {

// -------------------------------------------------------------------------------------- the rest

// Fills the memory with what a tile reads and the one before it did not, adjusted from contrast on.
template <bool packed>
__device__ inline void fill_to_blur(BlurMemory& memory, const GpuRoundArgs& args, const Job& job,
                                    const Jitter& colors, const Blur& blur) {
    const KeptPixels<packed> kept(args, job);
    constexpr int at_once = 2;  // pairs of rows
    const int radius = blur.radius, lane = threadIdx.x % warp_size;
    const int rows = (min2(tile_y, args.height - job.top) + 2 * radius + 1) / 2;  // pairs of them
    if (job.left == 0) {
        // What whole steps read beyond that meets taps of zero, but must be a number.
        uint32_t* const channel = &memory.pairs[0][0][0];
#pragma unroll 1
        for (int i = rows * BlurMemory::columns + threadIdx.x; i < BlurMemory::plane; i += threads)
            channel[i] = channel[i + BlurMemory::plane] = channel[i + 2 * BlurMemory::plane] = 0;
    }
    const int end = job.left + blur.columns();  // counted as in the memory
#pragma unroll 1
    for (int column = (job.left ? end - tile_x : 0) + lane; column < end; column += warp_size) {
        // Past what the last tile reads it may be any number.
        const int x = mirrored(min2(column - radius, args.width - 1 + radius), args.width);
        const KeptPixels<packed> down = kept.from_column(x);
        uint32_t* const first = &memory.pairs[0][0][column % BlurMemory::columns];
#pragma unroll 1
        for (int row = job.warp; row < rows; row += at_once * warps) {
            Rgb q[2 * at_once];
            uint32_t* to[at_once];
#pragma unroll
            for (int k = 0; k < at_once; ++k) {
                const int at = min2(row + k * warps, rows - 1);  // at the end twice the same
                const int y = job.top - radius + 2 * at;
                q[2 * k] = down.get(mirrored_once(y, args.height));
                q[2 * k + 1] = down.get(mirrored_once(y + 1, args.height));
                to[k] = first + at * BlurMemory::columns;
            }
            adjust(q, colors, colors.contrast_at, colors.count);
#pragma unroll
            for (int k = 0; k < at_once; ++k) {
                const Rgb &a = q[2 * k], &b = q[2 * k + 1];
                to[k][0] = to_halves(a.r - 0.5f, b.r - 0.5f);
                to[k][BlurMemory::plane] = to_halves(a.g - 0.5f, b.g - 0.5f);
                to[k][2 * BlurMemory::plane] = to_halves(a.b - 0.5f, b.b - 0.5f);
            }
        }
    }
}

// The source box of a view's patch, which `paste` may overwrite. Without one it is empty.
struct alignas(16) PatchBox {
    int top, left, height, width;
};

// Whether some of it may be among the 16 x 16 pixels from the thread's first one on.
__device__ inline bool meets(const Job& job, const PatchBox& box) {
    const int top = job.row - box.top, left = job.column - box.left;
    return top < box.height && top + side > 0 && left < box.width && left + side > 0;
}

__device__ inline void keep_patch(const GpuRoundArgs& args, const Job& job, const PatchBox& box,
                                  int channel, const Scaled& pixels) {
    float* kept = args.boxes + (3 * int64_t(job.index) + channel) * args.room;
    for_pixels(args, job, [&](int i, int y, int x) {
        const int row = y - box.top, column = x - box.left, at = row * box.width + column;
        if (row >= 0 && row < box.height && column >= 0 && column < box.width && at < args.room)
            kept[at] = clamp01(pixels[i]);
    });
}

// Too coarse to make further views from: see GpuRoundArgs::fine.
template <class T>
constexpr bool coarse = std::is_same_v<T, Bfloat> || std::is_same_v<T, uint8_t>;

// interleaved: the view's channels lie side by side, in pairs of pixels.
template <class T, bool packed, bool interleaved>
__global__ void __launch_bounds__(threads, 3) finish_kernel(const GpuRoundArgs args) {
    __shared__ BlurMemory memory;
    __shared__ Jitter colors;
    __shared__ PatchBox box;
    __shared__ Planes<T> target;  // of the view: registers are scarce
    __shared__ Planes<Half> fine;
    Job job = job_of_rows(args);
    const ViewParams& p = row_of(args, job);
    if (threadIdx.x == 0) {
        const bool none = int(p.patch_kind) == no_patch;
        target = planes_of<T>(args.target, job.view, job.image);
        fine = {};
        if (job.view < args.fine.count) fine = planes_of<Half>(args.fine, job.view, job.image);
        box = {int(p.patch_top), int(p.patch_left), none ? 0 : int(p.patch_height),
               none ? 0 : int(p.patch_width)};
        set_jitter_of_view(colors, p);
        float sum = 0;
#pragma unroll 1
        for (int i = 0; i < args.tiles; ++i) sum += args.sums[int64_t(job.index) * args.tiles + i];
        set_mean(colors, sum / (args.height * args.width));
    }
    const Blur blur(__shfl_sync(all_lanes, p.blur_sigma, 0), args.height);
    __syncthreads();

    bool in_patch = false;
    float values[3][pixels_each];
    const auto put_finished = [&](int channel, float scale, float shift) {
        const Scaled pixels{values[channel], scale, shift};
        if constexpr (!interleaved)
            put_channel(args, job, args.target, target.channel(channel), channel, pixels);
        if constexpr (coarse<T>) {
            if (fine.r) put_channel(args, job, args.fine, fine.channel(channel), channel, pixels);
        }
        if (in_patch) keep_patch(args, job, box, channel, pixels);
        if constexpr (interleaved) {
            const Scaled stored = as_stored(args.target, channel, pixels);
#pragma unroll
            for (int i = 0; i < pixels_each; ++i) values[channel][i] = stored[i];
            put_interleaved(args, job, target.r, target.down, channel, values);
        }
    };
#pragma unroll 1
    for (int left = 0; left < args.width; left += tile_x) {
        job.left = left;
        move_to(job, args, job.top + job.block_y() * side, left + job.block_x() * side);
        in_patch = meets(job, box);
        if (blur.radius > 0) {
            fill_to_blur<packed>(memory, args, job, colors, blur);
            __syncthreads();
            if (job.inside()) {
#pragma unroll
                for (int c = 0; c < 3; ++c) {
                    blur_channel(values[c], memory, job, blur, c);
                    put_finished(c, blur.gain, 0.5f);
                }
            }
            __syncthreads();
        } else if (job.inside()) {
            Rgb pixels[pixels_each] = {};
            KeptPixels<packed>(args, job).get(args, job, pixels);
            adjust(pixels, colors, colors.contrast_at, colors.count);
#pragma unroll
            for (int i = 0; i < pixels_each; ++i)
                values[0][i] = pixels[i].r, values[1][i] = pixels[i].g, values[2][i] = pixels[i].b;
#pragma unroll
            for (int c = 0; c < 3; ++c) put_finished(c, 1, 0);
        }
    }
}

// ------------------------------------------------------------------------------------- the patch

constexpr float log2_e = 1.44269504f;

// The blurred interval [start, start + length) of an axis of n pixels, at place i.
__device__ inline float alpha_along(int i, int start, int length, float sigma, int n) {
    const int radius = alpha_radius(sigma);
    const float slope = sigma > 0 ? -0.5f * log2_e / max2(sigma * sigma, 1e-30f) : 0;
    float inside = 0, total = 0;
#pragma unroll 1
    for (int k = -radius; k <= radius; ++k) {
        const float w = quick_exp2(k * k * slope);
        const int place = mirrored(i + k, n) - start;
        total += w;
        if (unsigned(place) < unsigned(length)) inside += w;
    }
    return inside / total;
}

// Some pixels of a patch, and where the threads find them in a view.
constexpr int patch_pixels = 4;  // at once: one would wait for the memory all the time
struct PatchPixels {
    Rgb pixels[patch_pixels];
    float alpha[patch_pixels];
    int y[patch_pixels], x[patch_pixels];
    int count;
};

template <class T>
__device__ inline void blend(const GpuViews& views, const Planes<T>& view,
                             const PatchPixels& patch) {
    Rgb before[patch_pixels];
#pragma unroll
    for (int k = 0; k < patch_pixels; ++k) {
        if (k >= patch.count) continue;
        const unsigned at = view.at(patch.y[k], patch.x[k]);
        before[k] = {value_of(view.r[at]), value_of(view.g[at]), value_of(view.b[at])};
    }
#pragma unroll
    for (int k = 0; k < patch_pixels; ++k) {
        if (k >= patch.count) continue;
        const unsigned at = view.at(patch.y[k], patch.x[k]);
        const auto blended = [&](float old, float value, int c) {
            return old + patch.alpha[k] * (value * views.scale[c] + views.shift[c] - old);
        };
        put(view.r + at, blended(before[k].r, patch.pixels[k].r, 0));
        put(view.g + at, blended(before[k].g, patch.pixels[k].g, 1));
        put(view.b + at, blended(before[k].b, patch.pixels[k].b, 2));
    }
}

// Blends the jittered patch in where alpha is not zero: out = (1 - alpha) out + alpha patch. A
// block does so for a view: patches are small.
template <class T>
__global__ void __launch_bounds__(threads, 2) paste_kernel(const GpuRoundArgs args) {
    constexpr int most = threads / 2;  // rows and columns at a time
    __shared__ Jitter colors;
    __shared__ float alpha[2][most];  // of rows and columns
    const Job job = job_of(args, blockIdx.x);
    const ViewParams& p = row_of(args, job);
    const int kind = int(p.patch_kind), height = int(p.patch_height), width = int(p.patch_width);
    if (kind == no_patch) return;
    const int top = int(p.target_top), left = int(p.target_left);
    const float sigma_y = kind == smooth_blend ? p.alpha_sigma_y : 0;
    const float sigma_x = kind == smooth_blend ? p.alpha_sigma_x : 0;
    if (threadIdx.x == 0) set_jitter_of_patch(colors, p);
    __syncthreads();

    // The block alone uses the view's patch: it is kept as it is up to contrast.
    float* box = args.boxes + 3 * int64_t(job.index) * args.room;
    const int area = min2(height * width, args.room);
    float mean = 0;
#pragma unroll 1
    for (int first = threadIdx.x; first < area; first += patch_pixels * threads) {
        Rgb q[patch_pixels];
#pragma unroll
        for (int k = 0; k < patch_pixels; ++k) {
            const int its = first + k * threads, i = its < area ? its : first;
            q[k] = {box[i], box[args.room + i], box[2 * args.room + i]};
        }
        adjust(q, colors, 0, colors.contrast_at);
#pragma unroll
        for (int k = 0; k < patch_pixels; ++k) {
            const int i = first + k * threads;
            if (i >= area) continue;
            box[i] = q[k].r, box[args.room + i] = q[k].g, box[2 * args.room + i] = q[k].b;
            mean += gray(q[k].r, q[k].g, q[k].b);
        }
    }
    mean = block_sum(mean) / area;
    if (threadIdx.x == 0) set_mean(colors, mean);
    __syncthreads();

    const auto view = planes_of<T>(args.target, job.view, job.image);
    const auto fine = planes_of<Half>(args.fine, job.view, job.image);
    const bool in_fine = args.paste_fine && job.view < args.fine.count;
    const int reach_y = alpha_radius(sigma_y), reach_x = alpha_radius(sigma_x);
    const int first_y = max2(top - reach_y, 0), end_y = min2(top + height + reach_y, args.height);
    const int first_x = max2(left - reach_x, 0), end_x = min2(left + width + reach_x, args.width);
    const int place = threadIdx.x % most;
#pragma unroll 1
    for (int y0 = first_y; y0 < end_y; y0 += most) {
#pragma unroll 1
        for (int x0 = first_x; x0 < end_x; x0 += most) {
            const int rows = min2(most, end_y - y0), columns = min2(most, end_x - x0);
            if (threadIdx.x < most) {
                if (place < rows)
                    alpha[0][place] = alpha_along(y0 + place, top, height, sigma_y, args.height);
            } else if (place < columns) {
                alpha[1][place] = alpha_along(x0 + place, left, width, sigma_x, args.width);
            }
            __syncthreads();
            const float inverse = 1.f / columns;
#pragma unroll 1
            for (int first = threadIdx.x; first < rows * columns; first += patch_pixels * threads) {
                PatchPixels patch{};
                bool inside[patch_pixels] = {};  // the patch; around it is black
#pragma unroll
                for (int k = 0; k < patch_pixels; ++k) {
                    const int i = first + k * threads;
                    if (i >= rows * columns) continue;
                    const int y = int((i + 0.5f) * inverse), x = i - y * columns;
                    const int row = y0 + y - top, column = x0 + x - left, at = row * width + column;
                    patch.y[k] = y0 + y, patch.x[k] = x0 + x, patch.count = k + 1;
                    patch.alpha[k] = alpha[0][y] * alpha[1][x];
                    inside[k] =
                        row >= 0 && row < height && column >= 0 && column < width && at < area;
                    if (inside[k])
                        patch.pixels[k] = {box[at], box[args.room + at], box[2 * args.room + at]};
                }
                adjust(patch.pixels, colors, colors.contrast_at, colors.count);
#pragma unroll
                for (int k = 0; k < patch_pixels; ++k)
                    if (!inside[k]) patch.pixels[k] = {};
                blend(args.target, view, patch);
                if (in_fine) blend(args.fine, fine, patch);
            }
            __syncthreads();
        }
    }
}

// ------------------------------------------------------------------------------------- launching

void launch(void (*kernel)(GpuRoundArgs), const GpuRoundArgs& args, int blocks_of_view) {
    const int64_t blocks = int64_t(args.n_images) * args.views_made * blocks_of_view;
    if (blocks > most_divided) throw std::invalid_argument("too many views for a launch");
    SPD_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(threads), 0,
               static_cast<cudaStream_t>(args.stream), args);
}

template <class T, bool interleaved>
auto finish_of(const GpuRoundArgs& args) {
    if constexpr (!std::is_same_v<T, float>)  // which is never packed
        if (args.packed) return finish_kernel<T, true, interleaved>;
    return finish_kernel<T, false, interleaved>;
}

template <class T>
void finish_and_paste(const GpuRoundArgs& args) {
    const bool interleaved = args.target.interleaved && args.target.together > 1;
    launch(interleaved ? finish_of<T, true>(args) : finish_of<T, false>(args), args, args.tiles);
    if (args.room) launch(paste_kernel<T>, args, 1);
}

template <class T>
auto resize_view_of(const GpuRoundArgs& args) {
    switch (reads_of(args.source, args.width)) {
        case Reads::planes: return resize_view_kernel<T, Reads::planes>;
        case Reads::interleaved: return resize_view_kernel<T, Reads::interleaved>;
        default: return resize_view_kernel<T, Reads::pixels>;
    }
}

}  // namespace

// How many neighbouring pixels can be read or written at once: 1, 2 or 4.
static int together(const GpuViews& views, int width) {
    static constexpr size_t itemsize[] = {4, 2, 2, 1};  // of a DType
    const auto fits = [&](size_t n) {
        bool all = width % n == 0 && (views.stride[4] == 1 || views.interleaved) &&
                   reinterpret_cast<uintptr_t>(views.data) % (n * itemsize[int(views.dtype)]) == 0;
        for (int axis : {0, 1, 3}) all = all && views.stride[axis] % n == 0;
        return all && (views.interleaved || views.stride[2] % n == 0);
    };
    return fits(4) ? 4 : fits(2) ? 2 : 1;
}

void augment_round_cuda(const GpuRoundArgs& given) {
    GpuRoundArgs args = given;
    args.per_image = inverse_of(args.views_made);
    args.per_tile = inverse_of(args.tiles);
    for (GpuViews* views : {&args.source, &args.target, &args.fine}) {
        views->interleaved = views->stride[4] == 3 && views->stride[2] == 1;
        views->together = together(*views, args.width);
        for (int c = 0; c < 3; ++c) {
            views->inverse_scale[c] = 1 / views->scale[c];
            views->middle[c] = 0.5f * views->scale[c] + views->shift[c];
        }
    }
    const auto resize = [&] {
        if (args.from_images)
            return args.target.dtype == DType::float32 ? resize_kernel<2> : resize_kernel<1>;
        return args.packed ? resize_view_of<Half>(args) : resize_view_of<float>(args);
    };
    launch(resize(), args, args.tiles);
    switch (args.target.dtype) {
        case DType::float32: finish_and_paste<float>(args); break;
        case DType::float16: finish_and_paste<Half>(args); break;
        case DType::bfloat16: finish_and_paste<Bfloat>(args); break;
        case DType::uint8: finish_and_paste<uint8_t>(args); break;
    }
}

}  // namespace spd
