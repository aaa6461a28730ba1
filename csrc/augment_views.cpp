// augment_views on the CPU: all views of one image, in float32.
//
// A view in the making is row-planar: S[y][c][x], so that a row's three channels lie together in
// cache, brightness and contrast run over 3 W floats at once, and vertical taps are whole rows.

#include "augment_views.h"

namespace spd {
namespace SPD_ISA {
namespace {

constexpr float negligible_tap = 1e-6f;

struct Size {
    int height, width;
    int row() const { return 3 * width; }
    size_t floats() const { return size_t(height) * row(); }
};

// ------------------------------------------------------------------------------ crop and resize

// For every output coordinate the first source coordinate and `taps` weights, none of which reads
// outside the source.
struct Taps {
    int taps;
    int* first;
    float* weights;  // (out, taps)
};

int most_taps(int in, int out) {
    const double support = max2(1.0, double(in) / out);
    return min2(in, int(ceil(2 * support)) + 1);
}

// Antialiased bilinear: a triangle as wide as the scale. `flip` reverses the output for nothing.
Taps resize_taps(int in, int out, bool flip, Pieces& pieces) {
    const double scale = double(in) / out, support = max2(1.0, scale);
    Taps t{most_taps(in, out), reinterpret_cast<int*>(pieces.take(out)), nullptr};
    t.weights = pieces.take(size_t(out) * t.taps);
    for (int i = 0; i < out; ++i) {
        const double centre = scale * (i + 0.5);
        const int place = flip ? out - 1 - i : i;
        const int first = min2(max2(int(centre - support + 0.5), 0), in - t.taps);
        float* w = t.weights + size_t(place) * t.taps;
        float sum = 0;
        for (int k = 0; k < t.taps; ++k) {
            const double distance = fabs(first + k + 0.5 - centre) / support;
            w[k] = float(max2(0.0, 1.0 - distance));
            sum += w[k];
        }
        for (int k = 0; k < t.taps; ++k) w[k] /= sum;
        t.first[place] = first;
    }
    return t;
}

// d[i] = sum over k of w[k] * s[k][i], rows `stride` apart
template <class T>
void weighted_rows(float* __restrict d, const T* s, ptrdiff_t stride, int n, const float* w,
                   int taps) {
    for (int i = 0; i < n; ++i) d[i] = w[0] * float(s[i]);
    for (int k = 1; k < taps; ++k) {
        const T* __restrict row = s + k * stride;
        if (w[k] != 0)
            for (int i = 0; i < n; ++i) d[i] += w[k] * float(row[i]);
    }
}

void weighted_columns(float* __restrict d, const float* __restrict s, const Taps& t, int n) {
    for (int x = 0; x < n; ++x) {
        const float* p = s + t.first[x];
        const float* w = t.weights + size_t(x) * t.taps;
        float sum = w[0] * p[0];
        for (int k = 1; k < t.taps; ++k) sum += w[k] * p[k];
        d[x] = sum;
    }
}

struct Box {
    int top, left, height, width;
};

// From interleaved 8-bit pixels, `image_width` to a row.
void resize_image(const uint8_t* image, int image_width, Box box, Size to, const Taps& ty,
                  const Taps& tx, float* mixed, float* planar, float* S) {
    const int n = 3 * box.width;
    for (int y = 0; y < to.height; ++y) {
        const uint8_t* s = image + (size_t(box.top + ty.first[y]) * image_width + box.left) * 3;
        weighted_rows(mixed, s, ptrdiff_t(image_width) * 3, n, ty.weights + size_t(y) * ty.taps,
                      ty.taps);
        for (int x = 0; x < box.width; ++x)
            for (int c = 0; c < 3; ++c) planar[c * box.width + x] = mixed[3 * x + c] * (1 / 255.f);
        for (int c = 0; c < 3; ++c)
            weighted_columns(S + size_t(y) * to.row() + c * to.width, planar + c * box.width, tx,
                             to.width);
    }
}

// From a view of the same size.
void resize_view(const float* view, Box box, Size to, const Taps& ty, const Taps& tx, float* line,
                 float* S) {
    for (int y = 0; y < to.height; ++y)
        for (int c = 0; c < 3; ++c) {
            const float* s =
                view + size_t(box.top + ty.first[y]) * to.row() + c * to.width + box.left;
            weighted_rows(line, s, to.row(), box.width, ty.weights + size_t(y) * ty.taps, ty.taps);
            weighted_columns(S + size_t(y) * to.row() + c * to.width, line, tx, to.width);
        }
}

// --------------------------------------------------------------------------------- colour jitter

struct Jitter {
    int order;
    float brightness, contrast, saturation, hue;
};

void brightness_row(float* __restrict p, int n, float factor) {
    for (int i = 0; i < n; ++i) p[i] = adjust_brightness(p[i], factor);
}

void contrast_row(float* __restrict p, int n, float factor, float rest) {
    for (int i = 0; i < n; ++i) p[i] = adjust_contrast(p[i], factor, rest);
}

void saturation_row(float* __restrict r, float* __restrict g, float* __restrict b, int n,
                    float factor) {
    for (int i = 0; i < n; ++i) {
        const Rgb p = adjust_saturation({r[i], g[i], b[i]}, factor);
        r[i] = p.r, g[i] = p.g, b[i] = p.b;
    }
}

void hue_row(float* __restrict r, float* __restrict g, float* __restrict b, int n, float sixths) {
    for (int i = 0; i < n; ++i) {
        const Rgb p = adjust_hue({r[i], g[i], b[i]}, sixths);
        r[i] = p.r, g[i] = p.g, b[i] = p.b;
    }
}

void gray_row(float* __restrict r, float* __restrict g, float* __restrict b, int n) {
    for (int i = 0; i < n; ++i) r[i] = g[i] = b[i] = gray(r[i], g[i], b[i]);
}

float mean_gray(const float* S, Size size) {
    double sum = 0;
    for (int y = 0; y < size.height; ++y) {
        const float *r = S + size_t(y) * size.row(), *g = r + size.width, *b = g + size.width;
        float row = 0;  // one row in float loses nothing that matters, the total would
        for (int x = 0; x < size.width; ++x) row += gray(r[x], g[x], b[x]);
        sum += row;
    }
    return float(sum / (double(size.height) * size.width));
}

void color_jitter(float* S, Size size, const Jitter& jitter) {
    const float turns = jitter.hue - floorf(jitter.hue);
    for (int step = 0; step < 4; ++step) {
        const int op = jitter_op(jitter.order, step);
        if (op == 1 && jitter.contrast != 1) {
            const float rest = (1 - jitter.contrast) * mean_gray(S, size);
            contrast_row(S, int(size.floats()), jitter.contrast, rest);
        } else if (op == 0 && jitter.brightness != 1) {
            brightness_row(S, int(size.floats()), jitter.brightness);
        } else if ((op == 2 && jitter.saturation != 1) || (op == 3 && jitter.hue != 0)) {
            for (int y = 0; y < size.height; ++y) {
                float *r = S + size_t(y) * size.row(), *g = r + size.width, *b = g + size.width;
                if (op == 2)
                    saturation_row(r, g, b, size.width, jitter.saturation);
                else
                    hue_row(r, g, b, size.width, 6 * turns);
            }
        }
    }
}

void grayscale(float* S, Size size) {
    for (int y = 0; y < size.height; ++y) {
        float* r = S + size_t(y) * size.row();
        gray_row(r, r + size.width, r + 2 * size.width, size.width);
    }
}

// ------------------------------------------------------------------------------------------ blur

// Weights of taps 0..radius of the whole kernel, normalised over it; returns the radius beyond
// which a tap is negligible (the rest is not renormalised: it is what a full kernel would add).
int blur_taps(float* w, int radius, float sigma) {
    float sum = 0;
    for (int k = -radius; k <= radius; ++k) sum += gaussian_tap(k, sigma);
    for (int k = 0; k <= radius; ++k) w[k] = gaussian_tap(k, sigma) / sum;
    while (radius > 0 && w[radius] < negligible_tap) --radius;
    return radius;
}

// d[i] = w[0] * s[i] + sum of w[k] * (before[k][i] + after[k][i])
void symmetric_tap(float* __restrict d, const float* __restrict a, const float* __restrict b, int n,
                   float w) {
    for (int i = 0; i < n; ++i) d[i] += w * (a[i] + b[i]);
}

void scaled(float* __restrict d, const float* __restrict s, int n, float w) {
    for (int i = 0; i < n; ++i) d[i] = w * s[i];
}

void gaussian_blur(const float* S, Size size, const float* w, int radius, float* line, float* out) {
    const int W = size.width, n = size.row();
    for (int y = 0; y < size.height; ++y) {
        float* row = out + size_t(y) * n;
        scaled(row, S + size_t(y) * n, n, w[0]);
        for (int k = 1; k <= radius; ++k)
            symmetric_tap(row, S + size_t(reflect(y - k, size.height)) * n,
                          S + size_t(reflect(y + k, size.height)) * n, n, w[k]);
        for (int c = 0; c < 3; ++c) {
            float *d = row + c * W, *centre = line + radius;
            memcpy(centre, d, W * sizeof(float));
            for (int k = 1; k <= radius; ++k) {
                centre[-k] = centre[reflect(-k, W)];
                centre[W - 1 + k] = centre[reflect(W - 1 + k, W)];
            }
            scaled(d, centre, W, w[0]);
            for (int k = 1; k <= radius; ++k) symmetric_tap(d, centre - k, centre + k, W, w[k]);
        }
    }
}

// ----------------------------------------------------------------------------------------- patch

// One inside [start, start + length), zero outside, blurred: SmoothBlend's alpha along one axis.
void alpha_vector(float* a, int n, int start, int length, float sigma) {
    const int radius = sigma > 0 ? alpha_radius(sigma) : 0;
    float sum = 0;
    for (int k = -radius; k <= radius; ++k) sum += radius ? gaussian_tap(k, sigma) : 1;
    for (int i = 0; i < n; ++i) {
        float inside = 0;
        for (int k = -radius; k <= radius; ++k) {
            const int source = reflect(i + k, n);
            if (source >= start && source < start + length)
                inside += radius ? gaussian_tap(k, sigma) : 1;
        }
        a[i] = inside / sum;
    }
}

// S = (1 - alpha) S + alpha u, u = zero but for the jittered patch; alpha(y, x) = a(y) b(x)
// exactly.
void paste_patch(float* S, Size size, const ViewParams& p, Pieces pieces) {
    const Box from{int(p.patch_top), int(p.patch_left), int(p.patch_height), int(p.patch_width)};
    const int top = int(p.target_top), left = int(p.target_left), W = size.width;
    const Size box{from.height, from.width};
    float* patch = pieces.take(box.floats());
    for (int y = 0; y < box.height; ++y)
        for (int c = 0; c < 3; ++c)
            memcpy(patch + size_t(y) * box.row() + c * box.width,
                   S + size_t(from.top + y) * size.row() + c * W + from.left,
                   box.width * sizeof(float));
    color_jitter(patch, box,
                 {int(p.patch_jitter_order), p.patch_brightness, p.patch_contrast,
                  p.patch_saturation, p.patch_hue});

    const bool smooth = int(p.patch_kind) == smooth_blend;
    float *a = pieces.take(size.height), *b = pieces.take(W);
    alpha_vector(a, size.height, top, box.height, smooth ? p.alpha_sigma_y : 0);
    alpha_vector(b, W, left, box.width, smooth ? p.alpha_sigma_x : 0);
    const int reach = smooth ? alpha_radius(p.alpha_sigma_x) : 0;
    const int x0 = max2(0, left - reach), x1 = min2(W, left + box.width + reach);
    for (int y = 0; y < size.height; ++y) {
        if (a[y] == 0) continue;
        for (int c = 0; c < 3; ++c) {
            float* row = S + size_t(y) * size.row() + c * W;
            for (int x = x0; x < x1; ++x) row[x] *= 1 - a[y] * b[x];
            if (y < top || y >= top + box.height) continue;
            const float* u = patch + size_t(y - top) * box.row() + c * box.width;
            for (int x = 0; x < box.width; ++x) row[left + x] += a[y] * b[left + x] * u[x];
        }
    }
}

// ------------------------------------------------------------------------- normalise and store

uint8_t to_uint8(float v) { return uint8_t(nearbyintf(clamp01(v) * 255)); }

template <class T, class Convert>
void store_row(T* out, ptrdiff_t stride, const float* __restrict s, int n, Convert convert) {
    if (stride == 1)
        for (int x = 0; x < n; ++x) out[x] = convert(s[x]);
    else
        for (int x = 0; x < n; ++x) out[x * stride] = convert(s[x]);
}

void store_view(const AugmentArgs& args, int view, int64_t image, const float* S) {
    const Size size{args.height, args.width};
    for (int y = 0; y < size.height; ++y)
        for (int c = 0; c < 3; ++c) {
            const float* s = S + size_t(y) * size.row() + c * size.width;
            const int64_t at = view * args.stride[0] + image * args.stride[1] + c * args.stride[2] +
                               y * args.stride[3];
            const float scale = args.scale[c], shift = args.shift[c];
            const ptrdiff_t step = args.stride[4];
            const int n = size.width;
            switch (args.dtype) {
                case DType::float32:
                    store_row(static_cast<float*>(args.out) + at, step, s, n,
                              [=](float v) { return v * scale + shift; });
                    break;
                case DType::float16:
                    store_row(static_cast<uint16_t*>(args.out) + at, step, s, n,
                              [=](float v) { return to_half(v * scale + shift); });
                    break;
                case DType::bfloat16:
                    store_row(static_cast<uint16_t*>(args.out) + at, step, s, n,
                              [=](float v) { return to_bfloat16(v * scale + shift); });
                    break;
                case DType::uint8:
                    store_row(static_cast<uint8_t*>(args.out) + at, step, s, n, to_uint8);
                    break;
            }
        }
}

// -------------------------------------------------------------------------------------- one view

struct Source {
    const uint8_t* image;  // null: from `view`
    int image_width;
    const float* view;
};

// Makes a view in one of the two buffers and returns which.
float* make_view(const Source& source, const ViewParams& p, Size size, float* S, float* spare,
                 Pieces pieces) {
    const Box box{int(p.crop_top), int(p.crop_left), int(p.crop_height), int(p.crop_width)};
    Pieces for_resize = pieces;
    const Taps ty = resize_taps(box.height, size.height, false, for_resize);
    const Taps tx = resize_taps(box.width, size.width, p.flip != 0, for_resize);
    float *mixed = for_resize.take(3 * size_t(box.width)),
          *planar = for_resize.take(3 * size_t(box.width));
    if (source.image)
        resize_image(source.image, source.image_width, box, size, ty, tx, mixed, planar, S);
    else
        resize_view(source.view, box, size, ty, tx, planar, S);

    color_jitter(S, size, {int(p.jitter_order), p.brightness, p.contrast, p.saturation, p.hue});
    if (p.grayscale != 0) grayscale(S, size);
    if (p.blur_sigma > 0) {
        Pieces for_blur = pieces;
        float* w = for_blur.take(blur_radius(size.height) + 1);
        const int radius = blur_taps(w, blur_radius(size.height), p.blur_sigma);
        if (radius > 0) {
            gaussian_blur(S, size, w, radius, for_blur.take(size.width + 2 * radius), spare);
            S = spare;
        }
    }
    if (int(p.patch_kind) != no_patch) paste_patch(S, size, p, pieces);
    return S;
}

// Floats that make_view takes from `pieces`, at most; 16 for rounding up every piece.
size_t most_scratch(const ViewParams* rows, int views, Size size) {
    size_t most = 0;
    for (int v = 0; v < views; ++v) {
        const int h = int(rows[v].crop_height), w = int(rows[v].crop_width);
        const size_t resize = size_t(size.height) * (most_taps(h, size.height) + 1) +
                              size_t(size.width) * (most_taps(w, size.width) + 1) + 6 * size_t(w);
        const size_t blur = 3 * size_t(blur_radius(size.height)) + size.width;
        const size_t patch = size.floats() + size.height + size.width;
        most = max2(most, max2(resize, max2(blur, patch)));
    }
    return most + 8 * 16;
}

}  // namespace

void augment_image(const AugmentArgs& args, int64_t image) {
    static thread_local Scratch scratch;
    const Size size{args.height, args.width};
    const ViewParams* rows = args.params + image * args.views;
    const int64_t* at = args.layout + 4 * image;
    const uint8_t* pixels = args.buffers[at[0]] + at[1];

    // A view that another one is made from is kept; the others share two planes.
    const size_t plane = size.floats() + 16;
    Pieces pieces{scratch.reserve((args.views + 2) * plane + most_scratch(rows, args.views, size) +
                                  2 * size_t(args.views) * sizeof(void*))};
    float** kept = reinterpret_cast<float**>(pieces.take(args.views * sizeof(void*)));
    float *work = pieces.take(plane), *spare = pieces.take(plane);
    for (int v = 0; v < args.views; ++v) kept[v] = nullptr;
    for (int v = 0; v < args.views; ++v)
        if (rows[v].source >= 0 && !kept[int(rows[v].source)])
            kept[int(rows[v].source)] = pieces.take(plane);

    // Sources first: every round makes the views whose source exists. The caller has made sure that
    // they do not form a circle.
    bool* done = reinterpret_cast<bool*>(pieces.take(args.views));
    memset(done, 0, args.views);
    for (int left = args.views; left > 0;)
        for (int v = 0; v < args.views; ++v) {
            const int source = int(rows[v].source);
            if (done[v] || (source >= 0 && !done[source])) continue;
            const Source from{source < 0 ? pixels : nullptr, int(at[3]),
                              source < 0 ? nullptr : kept[source]};
            const float* view = make_view(from, rows[v], size, work, spare, pieces);
            if (kept[v]) memcpy(kept[v], view, size.floats() * sizeof(float));
            store_view(args, v, image, view);
            done[v] = true;
            --left;
        }
}

}  // namespace SPD_ISA
}  // namespace spd
