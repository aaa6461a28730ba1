// Colour jitter and grayscale of one view, a row at a time while it is in the first cache. Contrast
// needs the mean of the whole view, so the adjustments before it and those after are two passes.
#pragma once

#include "augment_views.h"
#include "views_resize.h"

namespace spd {
namespace {  // internal linkage: see common.h

enum Adjust { brightness, contrast, saturation, hue, to_gray };

struct Adjustment {
    Adjust kind;
    float amount;  // factor; of hue, sixths of a circle in [0, 6)
    float rest;    // contrast: (1 - factor) * mean gray, filled in once it is known
};

struct Adjustments {
    Adjustment list[5];
    int count = 0;
    int contrast_at = -1;  // -1: there is none

    int before_contrast() const { return contrast_at < 0 ? count : contrast_at; }
    void add(Adjust kind, float amount) { list[count++] = {kind, amount, 0}; }
};

struct Jitter {
    int order;
    float brightness, contrast, saturation, hue;
};

// Those that change anything, in the jitter's order.
Adjustments adjustments_of(const Jitter& jitter, bool gray_at_the_end) {
    Adjustments a;
    for (int step = 0; step < 4; ++step) {
        const Adjust kind = Adjust(jitter_op(jitter.order, step));
        if (kind == brightness && jitter.brightness != 1) a.add(kind, jitter.brightness);
        if (kind == saturation && jitter.saturation != 1) a.add(kind, jitter.saturation);
        if (kind == hue && jitter.hue != 0) a.add(kind, 6 * (jitter.hue - floorf(jitter.hue)));
        if (kind == contrast && jitter.contrast != 1) {
            a.contrast_at = a.count;
            a.add(kind, jitter.contrast);
        }
    }
    if (gray_at_the_end) a.add(to_gray, 0);
    return a;
}

// Each loop runs over whole vectors: n is a multiple of row_multiple.

void adjust_brightness_row(float* __restrict p, int n, float factor) {
    for (int i = 0; i < n; ++i) p[i] = adjust_brightness(p[i], factor);
}

void adjust_contrast_row(float* __restrict p, int n, float factor, float rest) {
    for (int i = 0; i < n; ++i) p[i] = adjust_contrast(p[i], factor, rest);
}

void adjust_saturation_row(float* __restrict r, float* __restrict g, float* __restrict b, int n,
                           float factor) {
    for (int i = 0; i < n; ++i) {
        const Rgb p = adjust_saturation({r[i], g[i], b[i]}, factor);
        r[i] = p.r, g[i] = p.g, b[i] = p.b;
    }
}

void adjust_hue_row(float* __restrict r, float* __restrict g, float* __restrict b, int n,
                    float sixths) {
    for (int i = 0; i < n; ++i) {
        const Rgb p = adjust_hue({r[i], g[i], b[i]}, sixths);
        r[i] = p.r, g[i] = p.g, b[i] = p.b;
    }
}

void gray_row(float* __restrict r, float* __restrict g, float* __restrict b, int n) {
    for (int i = 0; i < n; ++i) r[i] = g[i] = b[i] = gray(r[i], g[i], b[i]);
}

void adjust_row(float* row, int pitch, const Adjustment* first, const Adjustment* last) {
    float *r = row, *g = row + pitch, *b = row + 2 * pitch;
    for (const Adjustment* a = first; a < last; ++a) switch (a->kind) {
            case brightness: adjust_brightness_row(row, 3 * pitch, a->amount); break;
            case contrast: adjust_contrast_row(row, 3 * pitch, a->amount, a->rest); break;
            case saturation: adjust_saturation_row(r, g, b, pitch, a->amount); break;
            case hue: adjust_hue_row(r, g, b, pitch, a->amount); break;
            case to_gray: gray_row(r, g, b, pitch); break;
        }
}

// The pad counts as well: it is zero, and brightness, saturation and hue leave zero as it is.
float gray_sum(const float* row, int pitch) {
    Floats r{}, g{}, b{};
    for (int x = 0; x < pitch; x += lanes) {
        r += load(row + x);
        g += load(row + pitch + x);
        b += load(row + 2 * pitch + x);
    }
    return gray(sum_of(r), sum_of(g), sum_of(b));
}

void set_contrast(Adjustments& a, double sum_of_gray, double pixels) {
    Adjustment& c = a.list[a.contrast_at];
    c.rest = (1 - c.amount) * float(sum_of_gray / pixels);
}

}  // namespace
}  // namespace spd
