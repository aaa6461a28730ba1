// SmoothBlend and CutPaste: a jittered patch of a view, blended in at another place of it.
#pragma once

#include "augment_views.h"
#include "views_blur.h"
#include "views_color.h"
#include "views_resize.h"

namespace spd {
namespace {  // internal linkage: see common.h

// One inside [start, start + length), zero outside, blurred: SmoothBlend's alpha along one axis.
float* alpha_along(int n, int start, int length, float sigma, Pieces& pieces) {
    const int radius = sigma > 0 ? alpha_radius(sigma) : 0;
    float* alpha = pieces.take(padded(n));
    float* taps = pieces.take(radius + 1);
    gaussian_taps(taps, radius, sigma > 0 ? sigma : 1);
    float* inside = pieces.take(padded(n) + 2 * size_t(radius)) + radius;
    for (int i = 0; i < n; ++i) inside[i] = i >= start && i < start + length;
    for (int i = n; i < padded(n) + radius; ++i) inside[i] = 0;
    mirror_ends(inside, n, radius);
    blur_line(alpha, inside, padded(n), taps, radius);
    return alpha;
}

// The box of `plane` as a plane of its own, with zeros in its pad.
Plane cut_out(const Plane& plane, Box box, Pieces& pieces) {
    const int pitch = padded(box.width), row = 3 * pitch;
    const Plane cut{pieces.take(size_t(box.height) * row), box.height, box.width, pitch, row};
    for (int y = 0; y < box.height; ++y)
        for (int c = 0; c < 3; ++c) {
            float* d = cut.at(y) + c * pitch;
            memcpy(d, plane.at(box.top + y) + c * plane.pitch + box.left,
                   box.width * sizeof(float));
            memset(d + box.width, 0, (pitch - box.width) * sizeof(float));
        }
    return cut;
}

void jitter_patch(const Plane& patch, const Jitter& jitter) {
    Adjustments colors = adjustments_of(jitter, false);
    const Adjustment* middle = colors.list + colors.before_contrast();
    double sum = 0;
    for (int y = 0; y < patch.height; ++y) {
        adjust_row(patch.at(y), patch.pitch, colors.list, middle);
        sum += gray_sum(patch.at(y), patch.pitch);
    }
    if (colors.contrast_at < 0) return;
    set_contrast(colors, sum, double(patch.height) * patch.width);
    for (int y = 0; y < patch.height; ++y)
        adjust_row(patch.at(y), patch.pitch, middle, colors.list + colors.count);
}

// plane = (1 - alpha) plane + alpha u, u = zero but for the patch; alpha(y, x) = a(y) b(x) exactly.
// Returns the box outside of which nothing has changed.
Box paste_patch(const Plane& plane, const ViewParams& p, Pieces pieces) {
    const Box from{int(p.patch_top), int(p.patch_left), int(p.patch_height), int(p.patch_width)};
    const int top = int(p.target_top), left = int(p.target_left);
    const Plane patch = cut_out(plane, from, pieces);
    jitter_patch(patch, {int(p.patch_jitter_order), p.patch_brightness, p.patch_contrast,
                         p.patch_saturation, p.patch_hue});

    const bool smooth = int(p.patch_kind) == smooth_blend;
    const float sigma_y = smooth ? p.alpha_sigma_y : 0, sigma_x = smooth ? p.alpha_sigma_x : 0;
    const float* a = alpha_along(plane.height, top, from.height, sigma_y, pieces);
    const float* b = alpha_along(plane.width, left, from.width, sigma_x, pieces);
    const int reach_y = alpha_radius(sigma_y), reach_x = alpha_radius(sigma_x);
    const int y0 = max2(0, top - reach_y), y1 = min2(plane.height, top + from.height + reach_y);
    const int x0 = max2(0, left - reach_x), x1 = min2(plane.width, left + from.width + reach_x);
    for (int y = y0; y < y1; ++y)
        for (int c = 0; c < 3; ++c) {
            float* __restrict row = plane.at(y) + c * plane.pitch;
            for (int x = x0; x < x1; ++x) row[x] *= 1 - a[y] * b[x];
            if (y < top || y >= top + from.height) continue;
            const float* __restrict u = patch.at(y - top) + c * patch.pitch;
            for (int x = 0; x < from.width; ++x) row[left + x] += a[y] * b[left + x] * u[x];
        }
    return {y0, x0, y1 - y0, x1 - x0};
}

size_t patch_scratch(const ViewParams& p, int height, int width) {
    if (int(p.patch_kind) == no_patch) return 0;
    const size_t cut = size_t(p.patch_height) * 3 * padded(int(p.patch_width));
    return cut + 2 * (padded(height) + padded(width)) +
           3 * (alpha_radius(p.alpha_sigma_y) + alpha_radius(p.alpha_sigma_x)) + 8 * 16;
}

}  // namespace
}  // namespace spd
