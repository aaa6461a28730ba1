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

// The pixels of a decoded image, in a crop: halves are a byte - 128. `usual`: whatever is read of a
// row ends in it, and neither axis takes more than `held` steps (see views_gpu_resize.h).
template <bool usual>
struct CropOfImage {
    static constexpr bool is_usual = usual;
    static constexpr bool packed = false;          // how what is made of it is kept
    static constexpr bool centred = true;          // whether a half of zero is the middle
    static constexpr bool many_registers = false;  // that reading it takes
    static constexpr float middle = 128 / 255.f;
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
        const auto of_word = [](uint32_t word, unsigned bytes) {
            return subtract_halves(__byte_perm(word, 0x64646464, bytes), 0x64806480);
        };
        const auto of_words = [&](uint32_t low, uint32_t high, unsigned bytes) {
            return of_word(__byte_perm(low, high, bytes), 0x4240);
        };
        place.from += 16 * 3 / 4;
        return {{of_word(x, 0x4340), of_words(y, z, 0x0502)},
                {of_words(x, y, 0x0401), of_words(y, z, 0x0603)},
                {of_words(x, y, 0x0502), of_word(z, 0x4340)}};
    }
    // What a half of 1 is worth.
    __device__ static float worth(const GpuRoundArgs&, int) { return 1 / 255.f; }
};

// The same of a finished view: halves are its normalised values. `usual`: four neighbours can be
// read at once, too.
template <class T, bool usual>
struct CropOfView {
    static constexpr bool is_half = std::is_same_v<T, Half>;
    static constexpr bool is_usual = usual, centred = !is_half, packed = is_half;
    static constexpr bool many_registers = !is_half;
    static constexpr float middle = 0.5f;
    Planes<const T> view;
    const float* half_way;  // of channels: what 0.5 is among the view's values
    int left, most;         // the crop's first column, and the view's last one

    struct Place {
        unsigned row;  // its offset; if usual, that of the pixel
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
        if constexpr (usual) return {unsigned(row * view.down + left + column), 0};
        return {unsigned(row * view.down), left + column};
    }
    __device__ FourPixels next(Place& place) const {
        FourPixels found;
        const auto read = [&](uint32_t (&to)[2], const T* plane, int c) {
            if constexpr (usual && is_half) {
                const uint2 four = *reinterpret_cast<const uint2*>(plane + place.row);
                to[0] = four.x, to[1] = four.y;
            } else {
                float4 four;
                if constexpr (usual) {
                    four = *reinterpret_cast<const float4*>(plane + place.row);
                } else {
                    const auto it = [&](int i) {
                        const int column = min2(place.column + i, most);
                        return value_of(plane[place.row + column * view.across]);
                    };
                    four = {it(0), it(1), it(2), it(3)};
                }
                const float less = is_half ? 0 : half_way[c];  // halves are finest around zero
                to[0] = to_halves(four.x - less, four.y - less);
                to[1] = to_halves(four.z - less, four.w - less);
            }
        };
        read(found.r, view.r, 0);
        read(found.g, view.g, 1);
        read(found.b, view.b, 2);
        if (usual) place.row += 16;
        place.column += 16;
        return found;
    }
    __device__ static float worth(const GpuRoundArgs& args, int channel) {
        return args.source.inverse_scale[channel];
    }
};

}  // namespace
}  // namespace spd
