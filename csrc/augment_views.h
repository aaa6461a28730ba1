// augment_views: parameters, and what happens to one pixel (host and device).
#pragma once

#include <cmath>

#include "common.h"

namespace spd {

// One row of the parameter table. The columns are those of spd_fast/views.py; integers are exact in
// float up to 2^24, which is more than any image side.
struct ViewParams {
    float source;  // -1: the decoded image; k: view k of the same image, before normalisation
    float crop_top, crop_left, crop_height, crop_width;  // pixels of the source
    float flip;
    float jitter_order, brightness, contrast, saturation, hue;
    float grayscale;
    float blur_sigma;
    float patch_kind;                                        // a PatchKind
    float patch_top, patch_left, patch_height, patch_width;  // pixels of the view
    float target_top, target_left;
    float patch_jitter_order, patch_brightness, patch_contrast, patch_saturation, patch_hue;
    float alpha_sigma_y, alpha_sigma_x;
};
constexpr int view_columns = 27;
static_assert(sizeof(ViewParams) == view_columns * sizeof(float), "one float per column");

constexpr int most_side = 1 << 24;        // pixels of an image or a view, see above
constexpr float most_alpha_sigma = 1e4f;  // pixels; its kernel has 4 sigma taps on either side

enum PatchKind { no_patch = 0, smooth_blend = 1, cut_paste = 2 };

struct AugmentArgs {
    const uint8_t* const* buffers;  // flat RGB pixels
    const int64_t* layout;          // (images, 4): buffer, offset, height, width
    const ViewParams* params;       // (images, views)
    int64_t images;
    int views;
    void* out;  // (views, images, 3, height, width)
    DType dtype;
    int64_t stride[5];  // of out, in elements
    int height, width;
    float scale[3], shift[3];  // stored value = view * scale + shift, per channel
};

// All views of one image; the images of a batch are independent of each other. False: out of
// memory.
#define SPD_DECLARE_AUGMENT(isa)                                \
    namespace isa {                                             \
    bool augment_image(const AugmentArgs& args, int64_t image); \
    }

// On a GPU, one round: views whose sources exist. Pointers are the device's.
constexpr int view_tile_y = 64;  // rows that a block makes
constexpr int most_views = 16;
constexpr int most_gpu_radius = 16;  // of the blur, whose tile and surroundings fit into 48 KB
struct GpuViews {
    void* data;  // (views, images, 3, height, width)
    DType dtype;
    int64_t stride[5];  // in elements
    float scale[3], shift[3];
    int count;  // the first views, that there are
    // Set by augment_round_cuda.
    bool interleaved = false;  // the channels of a pixel lie side by side
    // Neighbours that can be read or written at once; if interleaved, of all channels.
    int together = 1;
    float inverse_scale[3] = {}, middle[3] = {};  // 0.5 is stored as that
};
struct GpuRoundArgs {
    int view[most_views], views_made;
    const uint8_t* pixels;
    const int64_t* images;     // (images, 3): where an image begins in pixels, height, width
    const ViewParams* params;  // (images, views)
    int n_images, views, height, width, tiles;
    unsigned per_image, per_tile;  // set by augment_round_cuda: see divided
    bool from_images;
    GpuViews source;  // unless from_images
    GpuViews target;
    GpuViews fine;  // the first views once more, as float16
    void* scratch;  // see spd_fast/ops/view_rounds.py
    bool packed;
    float* sums;   // (jobs, tiles)
    float* boxes;  // (jobs, 3, room)
    int room;
    bool paste_fine;
    void* stream;
};
void augment_round_cuda(const GpuRoundArgs& args);

// -------------------------------------------------------------------------------- along one axis

// Antialiased bilinear resize: a triangle as wide as the scale, `support` = max(1, in / out) to
// either side of `centre` = (i + 0.5) * in / out.
SPD_HD static inline int most_taps(int in, int out) {
    return in == out ? 1 : min2(in, max2(2, (2 * in + out - 1) / out));  // 2 * support, rounded up
}

// Clamped, so that no tap reads outside the source.
template <class Real>
SPD_HD static inline int first_tap(Real centre, Real support, int in, int taps) {
    return min2(max2(int(centre - support + Real(0.5)), 0), in - taps);
}

// Not yet normalised; slope = 1 / support.
SPD_HD static inline float triangle(float distance, float slope) {
    return max2(0.f, 1 - fabsf(distance) * slope);
}

// ------------------------------------------------------------------------------------ one pixel

struct Rgb {
    float r, g, b;
};

SPD_HD static inline float gray(float r, float g, float b) {
    return 0.2989f * r + 0.587f * g + 0.114f * b;
}

SPD_HD static inline float adjust_brightness(float v, float factor) { return clamp01(v * factor); }

// rest = (1 - factor) * the mean gray of the image
SPD_HD static inline float adjust_contrast(float v, float factor, float rest) {
    return clamp01(factor * v + rest);
}

SPD_HD static inline Rgb adjust_saturation(Rgb p, float factor) {
    const float rest = (1 - factor) * gray(p.r, p.g, p.b);
    return {clamp01(factor * p.r + rest), clamp01(factor * p.g + rest),
            clamp01(factor * p.b + rest)};
}

// Of a number and another 6c away from it, the one in [0, 6c): seen as an unsigned integer, a float
// with a sign is larger than any without, and the order of the others is that of the integers. One
// instruction instead of a comparison and a choice.
SPD_HD static inline float smaller_bits(float a, float b) {
    return float_of(min2(bits_of(a), bits_of(b)));
}

// Turns the hue by `sixths` sixths of a circle, 0 <= sixths < 6. HSV without its divisions: with
// chroma c = max - min, h = 6 * hue * c runs through [0, 6c), and each channel is the minimum plus
// a trapezoid in h.
SPD_HD static inline Rgb adjust_hue(Rgb p, float sixths) {
    const float high = max2(p.r, max2(p.g, p.b)), low = min2(p.r, min2(p.g, p.b));
    const float c = high - low;
    const float if_red = p.g - p.b, if_green = 2 * c + (p.b - p.r), if_blue = 4 * c + (p.r - p.g);
    float h = if_blue;  // in [-c, 5c] after these two
    h = high == p.g ? if_green : h;
    h = high == p.r ? if_red : h;
    h += sixths * c;
    h = smaller_bits(h, h + 6 * c);
    h = smaller_bits(h, h - 6 * c);
    const float r = fabsf(h - 3 * c) + (high - 2 * c), g = (low + 2 * c) - fabsf(h - 2 * c),
                b = (low + 2 * c) - fabsf(h - 4 * c);
    return {min2(max2(r, low), high), min2(max2(g, low), high), min2(max2(b, low), high)};
}

// 8-bit output, rounded to nearest.
SPD_HD static inline uint8_t to_uint8(float v) { return uint8_t(int(clamp01(v) * 255 + 0.5f)); }

// Which adjustment stands at place `step` of jitter order 0..23, the permutations of {0 brightness,
// 1 contrast, 2 saturation, 3 hue} in lexicographic order.
SPD_HD static inline int jitter_op(int order, int step) {
    int used = 0, count = 6, op = 0;
    for (int s = 0; s <= step; ++s) {
        int skip = order / count;
        order %= count;
        count = s < 3 ? count / (3 - s) : 1;
        for (op = 0; used >> op & 1 || skip-- > 0;) ++op;
        used |= 1 << op;
    }
    return op;
}

// Weight of tap k (-radius..radius) is this over the sum of all taps.
SPD_HD static inline float gaussian_tap(int k, float sigma) {
    const float z = k / sigma;
    return expf(-0.5f * z * z);
}

// The odd kernel nearest a tenth of the height: 23 taps at 224.
SPD_HD static inline int blur_radius(int height) { return height / 20; }
constexpr float negligible_tap = 1e-6f;
SPD_HD static inline int alpha_radius(float sigma) { return int(ceilf(4 * sigma)); }

}  // namespace spd
