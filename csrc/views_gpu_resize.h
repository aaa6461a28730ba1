// The kernels of augment_views.cu that make pixels of a view from those of its source.
#pragma once

#include "views_gpu_source.h"

namespace spd {
namespace {

// Resizing along an axis is a product with a band matrix of triangles, on tensor cores. That of the
// columns gives 16 columns of 8 source rows at a time, in the very lanes where the product with the
// matrix of the rows needs them as its other operand: nothing goes through memory in between.

// The taps of 16 source pixels: halves, as multiply_add's first operand, not normalised yet. Two
// parts: what the first leaves of them, for twice as many bits.
template <int parts>
struct Taps {
    struct alignas(16) Part {
        uint32_t pairs[4];
    } part[parts];

    __device__ void multiply(float (&sums)[4], const uint32_t (&source)[2]) const {
#pragma unroll
        for (const auto& its : part) multiply_add(sums, its.pairs, source);
    }
    __device__ void add_to(float (&sums)[4]) const { multiply(sums, {0x3c003c00, 0x3c003c00}); }
};

// Of 16 neighbouring outputs along one axis.
struct Axis {
    float scale, slope;
    int in, out, start, flip;
    int begin, end, steps;  // source pixels that are read; 16 in a step

    // In source pixels; outputs past the end are as the last one.
    __device__ float centre(int i) const {
        const int place = min2(start + i, out - 1);
        return ((flip ? out - 1 - place : place) + 0.5f) * scale;
    }
    // A lane reads four neighbours in a row, or two pairs of rows.
    template <int parts>
    __device__ Taps<parts> taps_of_columns(int step) const {
        const int first = begin + 16 * step + threadIdx.x % 4 * 4;
        return taps<parts>(first, first + 2);
    }
    template <int parts>
    __device__ Taps<parts> taps_of_rows(int step) const {
        const int first = begin + 16 * step + threadIdx.x % 4 * 2;
        return taps<parts>(first, first + 8);
    }
    // Of outputs lane / 4 and lane / 4 + 8, on the source pixels `first`, first + 1, `second` and
    // second + 1.
    template <int parts>
    __device__ Taps<parts> taps(int first, int second) const {
        const int row = threadIdx.x % warp_size / 4;
        const float centres[2] = {centre(row), centre(row + 8)};
        Taps<parts> found;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float tap[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int at = (i / 2 ? second : first) + k;
                const float place = unsigned(at) < unsigned(in) ? at + 0.5f : -1e9f;
                tap[k] = triangle(place - centres[i % 2], slope);
            }
#pragma unroll
            for (auto& part : found.part) {
                part.pairs[i] = to_halves(tap[0], tap[1]);
                tap[0] -= value_of(Half{uint16_t(part.pairs[i])});
                tap[1] -= value_of(Half{uint16_t(part.pairs[i] >> 16)});
            }
        }
        return found;
    }
};

__device__ inline Axis axis_of(int in, int out, int start, int flip) {
    const float scale = float(in) / out, support = max2(1.f, scale);
    Axis axis{scale, 1 / support, in, out, start, flip, 0, 0, 0};
    const float a = axis.centre(0), b = axis.centre(side - 1);
    axis.begin = max2(int(min2(a, b) - support + 0.5f), 0);
    axis.end = min2(int(max2(a, b) + support + 0.5f), in);
    axis.steps = max2((axis.end - axis.begin + 15) / 16, 1);
    return axis;
}

// At least as many as an axis_of has.
__device__ inline int most_steps(int in, int out) {
    const float scale = float(in) / out;
    return int(((side - 1) * scale + 2 * max2(1.f, scale) + 1) / 16) + 1;
}

// Moves what is read of a row, `width` pixels of which `left` are before the crop, so that it ends
// there if the row is long enough, and begins at a multiple of `aligned` pixels.
__device__ inline void place_in_row(Axis& axis, int left, int width, int aligned) {
    const int lead = (left + axis.begin) % aligned;
    axis.begin -= lead;
    axis.steps += 16 * axis.steps < axis.end - axis.begin;
    if (width >= 16 * axis.steps) axis.begin = min2(axis.begin, width - left - 16 * axis.steps);
}

// Taps of `count` steps along an axis, worked out once. A lane reads what the same lane has kept.
template <int parts, int count>
struct HeldTaps {
    typename Taps<parts>::Part step[count][parts][warp_size];  // no bank conflicts

    __device__ void keep(int i, const Taps<parts>& taps) {
#pragma unroll
        for (int k = 0; k < parts; ++k) step[i][k][threadIdx.x % warp_size] = taps.part[k];
    }
    __device__ Taps<parts> of(int i) const {
        Taps<parts> taps;
#pragma unroll
        for (int k = 0; k < parts; ++k) taps.part[k] = step[i][k][threadIdx.x % warp_size];
        return taps;
    }
};

template <class Source, int parts, int count>
__device__ inline Taps<parts> taps_down(const Axis& axis, const HeldTaps<parts, count>& taps,
                                        int step) {
    constexpr bool all = Source::is_usual && count >= Source::most_steps;
    if (!all && step >= count) return axis.taps_of_rows<parts>(step);
    return taps.of(step);
}

template <class Source, int parts, int count>
__device__ inline Taps<parts> taps_across(const Axis& axis, const HeldTaps<parts, count>& taps,
                                          int step) {
    constexpr bool all = Source::is_usual && count >= Source::most_steps;
    if (!all && step >= count) return axis.taps_of_columns<parts>(step);
    return taps.of(step);
}

// A warp's 16 x 16 pixels. gain_down: 1 / the sums of the taps of the lane's rows.
template <int parts, class Source, class Down, class Across>
__device__ inline void resize(Rgb (&pixels)[pixels_each], const GpuRoundArgs& args,
                              const Source& source, const Axis& down, const Axis& across,
                              const Down& held_down, const Across& held_across,
                              const float (&gain_down)[2]) {
    constexpr bool usual = Source::is_usual;
    constexpr int at_once = Source::many_registers ? 1 : 2;  // times 8 source rows, half a step
    // What is summed along the row stays in the range of halves, however many pixels that are.
    const float shrink = usual ? 1 : across.slope;
    const int lane = threadIdx.x % warp_size, group = lane / 4, member = lane % 4;
    const int steps_down = down.steps, steps_across = across.steps;
    if (steps_down < 1 || steps_across < 1) __builtin_unreachable();  // loops need not ask
    float gain[4] = {};  // sums of the taps, of columns group and group + 8
#pragma unroll 1
    for (int k = 0; k < steps_across; ++k) taps_across<Source>(across, held_across, k).add_to(gain);
    // Halves are finest around zero: the middle is left out of what is summed along a row.
    float start[3][4] = {};
    if constexpr (!Source::centred) {
#pragma unroll
        for (int c = 0; c < 3; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) start[c][i] = -Source::middle_of(args, c) * gain[i];
    }

    const int first_row = down.begin + group, last_row = down.in - 1;
    const int first_column = across.begin + 4 * member;
    float sums[3][2][4] = {};  // of channels; left and right half of the columns
#pragma unroll 1
    for (int step = 0; step < steps_down; ++step) {
        uint32_t pairs[2][3][2];  // of rows, of the left and the right columns
#pragma unroll
        for (int begin = 0; begin < 2; begin += at_once) {
            typename Source::Place place[at_once];
            float columns[at_once][3][4];  // of 8 source rows each
#pragma unroll
            for (int u = 0; u < at_once; ++u) {
                const int row = min2(first_row + 16 * step + 8 * (begin + u), last_row);
                place[u] = source.at(row, first_column);
#pragma unroll
                for (int c = 0; c < 3; ++c)
#pragma unroll
                    for (int i = 0; i < 4; ++i) columns[u][c][i] = start[c][i];
            }
            const auto add_columns = [&](int k) {
                const Taps<parts> taps = taps_across<Source>(across, held_across, k);
#pragma unroll
                for (int u = 0; u < at_once; ++u) {
                    const FourPixels four = source.next(place[u]);
                    taps.multiply(columns[u][0], four.r);
                    taps.multiply(columns[u][1], four.g);
                    taps.multiply(columns[u][2], four.b);
                }
            };
            add_columns(0);  // apart: the sums need not be copied then
            if constexpr (usual && Source::most_steps == 2) {
                if (steps_across > 1) add_columns(1);
            } else {
#pragma unroll 1
                for (int k = 1; k < steps_across; ++k) add_columns(k);
            }
#pragma unroll
            for (int u = 0; u < at_once; ++u)
#pragma unroll
                for (int c = 0; c < 3; ++c) {
                    float (&its)[4] = columns[u][c];
                    if constexpr (!usual)
                        for (float& it : its) it *= shrink;
                    pairs[begin + u][c][0] = to_halves(its[0], its[1]);
                    pairs[begin + u][c][1] = to_halves(its[2], its[3]);
                }
        }
        const Taps<parts> taps = taps_down<Source>(down, held_down, step);
#pragma unroll
        for (int c = 0; c < 3; ++c)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                taps.multiply(sums[c][half], {pairs[0][c][half], pairs[1][c][half]});
    }
    // The lanes of group 2 * member and the next have the sums of this lane's columns.
#pragma unroll
    for (int column = 0; column < 4; ++column) {
        const float sum = __shfl_sync(all_lanes, gain[column / 2 * 2], 8 * member + column % 2 * 4);
        const float its_gain = quick_inverse(usual ? sum : sum * shrink);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const auto value = [&](int c) {
                const float sum = sums[c][column / 2][2 * row + column % 2];
                const float its_worth = gain_down[row] * Source::worth(args, c);
                return clamp01(sum * (its_gain * its_worth) + Source::middle);
            };
            pixels[4 * row + column] = {value(0), value(1), value(2)};
        }
    }
}

template <int parts, int most>
struct ResizeMemory {
    // Four steps in two parts would take all of the 48 KB that a block may have.
    static constexpr int across_held = most > 3 && parts == 2 ? 3 : most;
    HeldTaps<parts, most> down[blocks_y];
    HeldTaps<parts, across_held> across[warps];
};

// The axes of all blocks of 16 columns, up to 32 of them at a time: a lane has one.
struct Columns {
    Axis of_lane;
    int crop_left, row_length, aligned;

    __device__ void set(const GpuRoundArgs& args, const ViewParams& p, int first_block) {
        const int start = (first_block + int(threadIdx.x) % warp_size) * side;
        // Flipping commutes with all that comes before the patch.
        of_lane = axis_of(int(p.crop_width), args.width, start, p.flip != 0);
        place_in_row(of_lane, int(p.crop_left), row_length, aligned);
    }
    __device__ Axis of(int block) const {
        Axis axis = of_lane;
        axis.start = block * side;
        axis.begin = __shfl_sync(all_lanes, of_lane.begin, block % warp_size);
        axis.steps = __shfl_sync(all_lanes, of_lane.steps, block % warp_size);
        return axis;
    }
};

// The rows of a block; returns the sum of the thread's gray. `row_length`: of the source;
// `aligned`: pixels at a multiple of which reading begins. Warps share the taps of the rows alone,
// and once these are there do not wait for each other.
template <int parts, class Source>
__device__ inline float resize_rows(const GpuRoundArgs& args, Job& job, const ViewParams& p,
                                    const Source& source, int row_length, int aligned,
                                    const Jitter& colors,
                                    ResizeMemory<parts, Source::most_steps>& memory) {
    // A warp keeps its 16 rows. Where a view ends, a block has fewer of them: with one or two times
    // 16, more warps share them; with three, a quarter of the warps has none.
    const int rows_left = args.height - job.top;
    const int sharing = rows_left > 2 * side ? warps / 4 : rows_left > side ? warps / 2 : warps;
    const int block_y = job.warp / sharing, first = job.warp % sharing;
    const int row = job.top + block_y * side;
    const Axis down = axis_of(int(p.crop_height), args.height, row, 0);
    Columns columns{{}, int(p.crop_left), row_length, aligned};
    columns.set(args, p, 0);
    auto& taps_of_rows = memory.down[block_y];
#pragma unroll 1
    for (int step = first; step < min2(down.steps, Source::most_steps); step += sharing)
        taps_of_rows.keep(step, down.taps_of_rows<parts>(step));
    __syncthreads();
    float sums_down[4] = {};  // of the taps, of rows group and group + 8
#pragma unroll 1
    for (int step = 0; step < down.steps; ++step)
        taps_down<Source>(down, taps_of_rows, step).add_to(sums_down);
    const float gain_down[2] = {quick_inverse(sums_down[0]), quick_inverse(sums_down[2])};
    auto& taps = memory.across[job.warp];
    float sum = 0;
#pragma unroll 1
    for (int block = first; block * side < args.width; block += sharing) {
        if (block >= warp_size && block % warp_size < sharing) columns.set(args, p, block - first);
        const Axis across = columns.of(block);
#pragma unroll 1
        for (int step = 0; step < min2(across.steps, memory.across_held); ++step)
            taps.keep(step, across.taps_of_columns<parts>(step));
        move_to(job, args, row, block * side);
        if (job.inside()) {
            Rgb pixels[pixels_each];
            resize<parts>(pixels, args, source, down, across, taps_of_rows, taps, gain_down);
            adjust(pixels, colors, 0, colors.contrast_at);
            KeptPixels<Source::packed>(args, job).put(args, job, pixels);
            Rgb of_block = {};
            const auto add = [&](const Rgb& q) {
                of_block = {of_block.r + q.r, of_block.g + q.g, of_block.b + q.b};
            };
            for_pairs(args, job, [&](int i, int, int x) {
                add(pixels[i]);
                if (x + 1 < args.width) add(pixels[i + 1]);
            });
            sum += gray(of_block.r, of_block.g, of_block.b);
        }
    }
    return sum;
}

// Crop, resize, flip, and colours up to contrast. parts: of taps, two for views in float32.
template <int parts>
__global__ void __launch_bounds__(threads, 2) resize_kernel(const GpuRoundArgs args) {
    __shared__ ResizeMemory<parts, held> memory;
    __shared__ Jitter colors;
    Job job = job_of_rows(args);
    const ViewParams& p = row_of(args, job);
    // Read after the first barrier.
    if (threadIdx.x == 0) set_jitter_of_view(colors, p);
    const int row_length = int(args.images[3 * int64_t(job.image) + 2]);
    const int steps_across = most_steps(int(p.crop_width), args.width);
    const int steps_down = most_steps(int(p.crop_height), args.height);
    float sum;
    if (max2(steps_across, steps_down) <= held && 16 * steps_across <= row_length) {
        const CropOfImage<true> source(args, job, p);
        sum = resize_rows(args, job, p, source, row_length, 1, colors, memory);
    } else {
        const CropOfImage<false> source(args, job, p);
        sum = resize_rows(args, job, p, source, row_length, 1, colors, memory);
    }
    keep_sum(args, job, sum);
}

// The same from finished views, which hold T.
template <class T, Reads reads>
__global__ void __launch_bounds__(threads, 2) resize_view_kernel(const GpuRoundArgs args) {
    using Source = CropOfView<T, reads>;
    constexpr int parts = std::is_same_v<T, float> ? 2 : 1;
    __shared__ ResizeMemory<parts, Source::most_steps> memory;
    __shared__ Jitter colors;
    Job job = job_of_rows(args);
    const ViewParams& p = row_of(args, job);
    if (threadIdx.x == 0) set_jitter_of_view(colors, p);
    const Source source(args, job, p);
    const int aligned = Source::is_usual ? 4 : 1;
    keep_sum(args, job, resize_rows(args, job, p, source, args.width, aligned, colors, memory));
}

// A crop of a view is never larger than a view: there are two steps at most.
inline Reads reads_of(const GpuViews& source, int width) {
    if (source.together < 4 || width < 2 * 16) return Reads::pixels;
    return source.interleaved ? Reads::interleaved : Reads::planes;
}

}  // namespace
}  // namespace spd
