// Where views_gpu_resize.h reads pixels: crops of decoded images and of finished views.
#pragma once

#include <type_traits>

#include "views_gpu.h"

namespace spd {
namespace {

// Four neighbours in a row, as pairs of halves.
struct FourPixels {
    uint32_t r[2], g[2], b[2];
};

// The pixels of a decoded image, in a crop: halves are 1024 + a byte, which takes no conversion.
// `usual`: whatever is read of a row ends in it, and neither axis takes more than `held` steps (see
// views_gpu_resize.h).
template <bool usual>
struct CropOfImage {
    static constexpr bool is_usual = usual;
    static constexpr bool packed = false;          // whether views made from it are kept packed
    static constexpr bool many_registers = false;  // whether reading it takes them
    static constexpr bool two_steps = false;       // along a row, at most
    static constexpr bool centred = false;         // whether a half of zero is the middle
    static constexpr float middle = 128 / 255.f;   // in [0, 1]
    const uint8_t* corner;
    unsigned pitch;
    const uint32_t* last;  // word of the image: none after it is read

    struct Place {
        const uint32_t* from;
        unsigned bits;  // of its word before the first pixel: modulo 32
    };

    __device__ CropOfImage(const GpuRoundArgs& args, const Job& job, const ViewParams& p) {
        const int64_t* image = args.images + 3 * int64_t(job.image);
        const uint8_t* first = args.pixels + image[0];
        pitch = 3 * unsigned(image[2]);
        corner = first + unsigned(p.crop_top) * pitch + 3 * int(p.crop_left);
        const auto end = reinterpret_cast<uintptr_t>(first + unsigned(image[1]) * pitch);
        last = reinterpret_cast<const uint32_t*>((end - 1) / 4 * 4);
    }
    __device__ Place at(int row, int column) const {
        const auto first = reinterpret_cast<uintptr_t>(corner) + int64_t(row * pitch) + 3 * column;
        return {reinterpret_cast<const uint32_t*>(first & ~uintptr_t(3)), 8 * unsigned(first)};
    }
    // Then 16 pixels on. Whole words are read, but none without a byte of the pixels.
    __device__ FourPixels next(Place& place) const {
        const auto word = [&](int i) {
            return load_word(usual ? place.from + i : min2(place.from + i, last));
        };
        const uint32_t a = word(0), b = word(1), c = word(2), d = place.bits % 32 ? word(3) : 0;
        const uint32_t x = __funnelshift_r(a, b, place.bits), y = __funnelshift_r(b, c, place.bits),
                       z = __funnelshift_r(c, d, place.bits);
        // 0x6400 is 1024 in half precision, which a byte adds to.
        const auto halves = [](uint32_t word, unsigned bytes) {
            return __byte_perm(word, 0x64646464, bytes);
        };
        const uint32_t gb = __byte_perm(x, y, 0x5421), rg = __byte_perm(y, z, 0x6532);
        place.from += 16 * 3 / 4;
        return {{halves(x, 0x4340), halves(rg, 0x4240)},
                {halves(gb, 0x4240), halves(rg, 0x4341)},
                {halves(gb, 0x4341), halves(z, 0x4340)}};
    }
    // The half that stands for the middle, and what a half of 1 is worth in [0, 1].
    __device__ static float middle_of(const GpuRoundArgs&, int) { return 1024 + 128; }
    __device__ static float worth(const GpuRoundArgs&, int) { return 1 / 255.f; }
};

// The same of a finished view: halves are its normalised values, of float32 less the middle.
// `usual`: four neighbours can be read at once, too.
template <class T, bool usual>
struct CropOfView {
    static constexpr bool is_half = std::is_same_v<T, Half>;
    static constexpr bool is_usual = usual, packed = is_half;
    static constexpr bool many_registers = !is_half;
    static constexpr bool two_steps = usual;  // as a crop is not larger than its view
    static constexpr bool centred = !is_half;
    static constexpr float middle = 0.5f;
    Planes<const T> view;
    const float* half_way;  // of channels: what 0.5 is among the view's values
    int left, most;         // the crop's first column, and the view's last one

    struct Place {
        const T *r, *g, *b;  // if usual the pixel, else its row
        int column;
    };

    __device__ CropOfView(const GpuRoundArgs& args, const Job& job, const ViewParams& p)
        : view(planes_of<const T>(args.source, int(p.source), job.image)),
          half_way(args.source.middle),
          left(int(p.crop_left)),
          most(args.width - 1) {
        const int top = int(p.crop_top) * view.down;
        view.r += top, view.g += top, view.b += top;
    }
    __device__ Place at(int row, int column) const {
        const unsigned at = row * view.down + (usual ? left + column : 0);
        return {view.r + at, view.g + at, view.b + at, left + column};
    }
    __device__ FourPixels next(Place& place) const {
        FourPixels found;
        const auto read = [&](uint32_t (&to)[2], const T* plane, int c) {
            if constexpr (usual && is_half) {
                const uint2 four = *reinterpret_cast<const uint2*>(plane);
                to[0] = four.x, to[1] = four.y;
            } else {
                float4 four;
                if constexpr (usual) {
                    four = *reinterpret_cast<const float4*>(plane);
                } else {
                    const auto it = [&](int i) {
                        const int column = min2(place.column + i, most);
                        return value_of(plane[column * view.across]);
                    };
                    four = {it(0), it(1), it(2), it(3)};
                }
                const float less = is_half ? 0 : half_way[c];  // halves are finest around zero
                to[0] = to_halves(four.x - less, four.y - less);
                to[1] = to_halves(four.z - less, four.w - less);
            }
        };
        read(found.r, place.r, 0);
        read(found.g, place.g, 1);
        read(found.b, place.b, 2);
        if (usual) place.r += 16, place.g += 16, place.b += 16;
        place.column += 16;
        return found;
    }
    __device__ static float middle_of(const GpuRoundArgs& args, int channel) {
        return args.source.middle[channel];
    }
    __device__ static float worth(const GpuRoundArgs& args, int channel) {
        return args.source.inverse_scale[channel];
    }
};

}  // namespace
}  // namespace spd
