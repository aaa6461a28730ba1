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

constexpr int held = 4;  // steps of 16 pixels whose taps are worked out once

// The pixels of a decoded image, in a crop: halves are 1024 + a byte, which takes no conversion.
// `usual`: whatever is read of a row ends in it, and neither axis takes more than `held` steps (see
// views_gpu_resize.h).
template <bool usual>
struct CropOfImage {
    static constexpr bool is_usual = usual;
    static constexpr bool packed = false;          // whether views made from it are kept packed
    static constexpr bool many_registers = false;  // whether reading it takes them
    static constexpr int most_steps = held;        // of 16 pixels along an axis, if usual
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

// Four neighbours of a view at once, of a channel or, where these lie side by side, of all; or one
// pixel at a time.
enum class Reads { planes, interleaved, pixels };

// The same of a finished view: halves are its normalised values, of float32 less the middle.
template <class T, Reads reads>
struct CropOfView {
    static constexpr bool is_half = std::is_same_v<T, Half>;
    static constexpr bool usual = reads != Reads::pixels, is_usual = usual, packed = is_half;
    static constexpr int apart = reads == Reads::interleaved ? 3 : 1;  // neighbours, in elements
    static constexpr bool many_registers = !is_half;
    static constexpr int most_steps = 2;  // as a crop is not larger than its view
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
        const unsigned at = row * view.down + (usual ? apart * (left + column) : 0);
        return {view.r + at, view.g + at, view.b + at, left + column};
    }
    __device__ FourPixels next(Place& place) const {
        const FourPixels found = four(place);
        if (usual) place.r += 16 * apart, place.g += 16 * apart, place.b += 16 * apart;
        place.column += 16;
        return found;
    }
    __device__ static float middle_of(const GpuRoundArgs& args, int channel) {
        return args.source.middle[channel];
    }
    __device__ static float worth(const GpuRoundArgs& args, int channel) {
        return args.source.inverse_scale[channel];
    }

  private:
    __device__ FourPixels four(const Place& place) const {
        if constexpr (reads == Reads::interleaved && is_half) {
            const auto* from = reinterpret_cast<const uint2*>(place.r);
            const uint2 a = from[0], b = from[1], c = from[2];
            const auto low_high = [](uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7610); };
            const auto high_low = [](uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5432); };
            return {{low_high(a.x, a.y), low_high(b.y, c.x)},
                    {high_low(a.x, b.x), high_low(b.y, c.y)},
                    {low_high(a.y, b.x), low_high(c.x, c.y)}};
        } else if constexpr (reads == Reads::interleaved) {
            const auto* from = reinterpret_cast<const float4*>(place.r);
            const float4 a = from[0], b = from[1], c = from[2];
            FourPixels found;
            centre(found.r, {a.x, a.w, b.z, c.y}, 0);
            centre(found.g, {a.y, b.x, b.w, c.z}, 1);
            centre(found.b, {a.z, b.y, c.x, c.w}, 2);
            return found;
        } else {
            FourPixels found;
            read(found.r, place.r, place.column, 0);
            read(found.g, place.g, place.column, 1);
            read(found.b, place.b, place.column, 2);
            return found;
        }
    }
    __device__ void centre(uint32_t (&to)[2], const float4& four, int channel) const {
        const float less = is_half ? 0 : half_way[channel];  // halves are finest around zero
        to[0] = to_halves(four.x - less, four.y - less);
        to[1] = to_halves(four.z - less, four.w - less);
    }
    __device__ void read(uint32_t (&to)[2], const T* plane, int column, int channel) const {
        if constexpr (usual && is_half) {
            const uint2 four = *reinterpret_cast<const uint2*>(plane);
            to[0] = four.x, to[1] = four.y;
        } else if constexpr (usual) {
            centre(to, *reinterpret_cast<const float4*>(plane), channel);
        } else {
            const auto it = [&](int i) {
                return value_of(plane[min2(column + i, most) * view.across]);
            };
            centre(to, {it(0), it(1), it(2), it(3)}, channel);
        }
    }
};

}  // namespace
}  // namespace spd
