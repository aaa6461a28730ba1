// PaDiM's distances on a GPU, of up to 4 images: a block of threads for every position of the grid,
// which reads the position's factor once, 16 bytes a thread at a time.
//
// More images are left to Triton's kernel, which multiplies on tensor cores: there the factor's
// bytes no longer bind, and here the registers would not suffice.

#include "cuda.h"
#include "mahalanobis.h"

namespace spd {
namespace {

constexpr int warps = 4, threads = warps * warp_size;

// 16 bytes of a panel as floats: V rows of one column.
template <class T, int V>
__device__ inline void widen(const uint4& words, float (&rows)[V]) {
    static_assert(V * sizeof(T) == sizeof(uint4));
    T parts[V];
    memcpy(parts, &words, sizeof words);
    for (int i = 0; i < V; ++i) rows[i] = value_of(parts[i]);
}

// Of channel c of image `image` at the places of this position in the layers; 0 if no layer has it.
__device__ inline float feature(const GpuMahalanobisArgs& args, const int64_t* place, int image,
                                int64_t c) {
    for (int l = 0; l < args.layers && c >= 0; ++l) {
        const Layer& layer = args.layer[l];
        if (c < layer.channels)
            return layer.data[image * layer.stride[0] + c * layer.stride[1] + place[l]];
        c -= layer.channels;
    }
    return 0;
}

// Sums of N values over the lanes that differ in bits `unit` and above only; afterwards a lane has
// that of value lane / unit. N - 1 exchanges instead of N log2(N). A recursion: nvcc does not
// unroll a loop that halves its bound, and the array would then go to memory.
template <int unit, int half, int N>
__device__ inline float reduce_scatter(float (&values)[N], int lane) {
    if constexpr (half == 0) {
        return values[0];
    } else {
        const bool upper = lane & (half * unit);
#pragma unroll
        for (int j = 0; j < half; ++j) {
            const float sent = upper ? values[j] : values[j + half];
            const float kept = upper ? values[j + half] : values[j];
            values[j] = kept + __shfl_xor_sync(all_lanes, sent, half * unit);
        }
        return reduce_scatter<unit, half / 2>(values, lane);
    }
}

// B images, of which the last may be absent. A warp takes G panels at a time, so that it always
// has 4 V sums per lane, and every column that it reads of x serves all of them.
template <class T, int B>
__global__ void __launch_bounds__(threads, 5) mahalanobis_kernel(const GpuMahalanobisArgs args) {
    constexpr int V = sizeof(uint4) / sizeof(T);           // rows of a 16-byte load
    constexpr int lanes_per_column = 8 / V;                // panels have 8 rows
    constexpr int columns = warp_size / lanes_per_column;  // that a warp loads at once
    constexpr int G = 4 / B, N = G * B * V;
    SPD_DYNAMIC_SHARED(float, x);  // (8 panels, B): x - mean, zero past channel d
    __shared__ float part[warps][B];
    __shared__ int64_t place[most_layers];
    static_assert(
        8 * panels(most_channels) * most_images * sizeof(float) + sizeof part + sizeof place <=
            most_shared,
        "more than a launch may ask for");

    const int position = blockIdx.x, lane = threadIdx.x % warp_size;
    const int warp = threadIdx.x / warp_size, n_panels = panels(args.d);
    if (threadIdx.x < unsigned(args.layers)) {
        const Layer& layer = args.layer[threadIdx.x];
        const int row = position / args.grid_width * layer.height / args.grid_height;
        const int column = position % args.grid_width * layer.width / args.grid_width;
        place[threadIdx.x] = row * layer.stride[2] + column * layer.stride[3];
    }
    __syncthreads();
    for (int k = threadIdx.x; k < 8 * n_panels; k += threads) {
        const bool inside = k < args.d;
        const int64_t c = inside ? args.channels[k] : -1;
        const float mean = inside ? args.mean[int64_t(position) * args.d + k] : 0;
        for (int b = 0; b < B; ++b)
            x[k * B + b] = inside && b < args.batch ? feature(args, place, b, c) - mean : 0;
    }
    __syncthreads();

    const T* factor = static_cast<const T*>(args.factor) + position * packed_size(args.d);
    const int groups = (n_panels + G - 1) / G, first_row = lane % lanes_per_column * V;
    float squares = 0;
    for (int q = 0; q * warps < groups; ++q) {
        // The longest first, dealt out to and fro, so that all warps end at about the same time.
        const int group = groups - 1 - (warps * q + (q % 2 ? warps - 1 - warp : warp));
        if (group < 0) continue;
        const int first = group * G, last = min2(first + G, n_panels) - 1;
        float sums[N] = {};
#pragma unroll 2
        for (int k = lane / lanes_per_column; k < 8 * (last + 1); k += columns) {
            uint4 words[G];
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const int r = first + g;
                words[g] = uint4{0, 0, 0, 0};
                if (r <= last && k < 8 * (r + 1))
                    words[g] = *reinterpret_cast<const uint4*>(factor + panel_start(r) + 8 * k +
                                                               first_row);
            }
            float of_column[B];
#pragma unroll
            for (int b = 0; b < B; ++b) of_column[b] = x[k * B + b];
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float rows[V];
                widen<T>(words[g], rows);
#pragma unroll
                for (int b = 0; b < B; ++b)
#pragma unroll
                    for (int i = 0; i < V; ++i) sums[(g * B + b) * V + i] += rows[i] * of_column[b];
            }
        }
        const float y = reduce_scatter<lanes_per_column, N / 2>(sums, lane);
        squares += y * y;
    }
    // A lane has rows of one image: value lane / lanes_per_column = (g B + b) V + i. The others of
    // that image differ in the bits below and above those of b.
    constexpr int image_unit = V * lanes_per_column;
#pragma unroll
    for (int bit = 1; bit < warp_size; bit *= 2)
        if (bit < image_unit || bit >= image_unit * B)
            squares += __shfl_xor_sync(all_lanes, squares, bit);
    if (lane % image_unit == 0 && lane / image_unit < B) part[warp][lane / image_unit] = squares;
    __syncthreads();
    const int b = threadIdx.x;
    if (b < args.batch)
        args.out[int64_t(b) * gridDim.x + position] =
            sqrtf(part[0][b] + part[1][b] + part[2][b] + part[3][b]);
}

template <class T, int B>
void launch(const GpuMahalanobisArgs& args) {
    const size_t shared = 8 * panels(args.d) * B * sizeof(float);
    const int positions = args.grid_height * args.grid_width;
    SPD_LAUNCH((mahalanobis_kernel<T, B>), dim3(positions), dim3(threads), shared,
               static_cast<cudaStream_t>(args.stream), args);
}

template <class T>
void launch(const GpuMahalanobisArgs& args) {
    if (args.batch == 1) return launch<T, 1>(args);
    if (args.batch == 2) return launch<T, 2>(args);
    launch<T, 4>(args);
}

}  // namespace

void mahalanobis_cuda(const GpuMahalanobisArgs& args) {
    switch (args.factor_type) {
        case FactorType::float32: return launch<float>(args);
        case FactorType::float16: return launch<Half>(args);
        case FactorType::bfloat16: return launch<Bfloat>(args);
        case FactorType::int8: break;  // refused before
    }
}

}  // namespace spd
