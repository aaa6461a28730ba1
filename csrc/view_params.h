// Drawing one row of the table of view parameters, as spd_fast/views.py does for many at once with
// numpy: the same numbers in the same order of operations, so the same rows. Compile without
// contraction to FMA, which would round differently.
#pragma once

#include "augment_views.h"
#include "philox.h"

namespace spd {

// The ranges of one view of a recipe: a row of what `_range_table` in spd_fast/views.py makes.
struct ViewRanges {
    double source;
    double area[2];                                         // share of the source
    double aspect[2], log_aspect[2];                        // width / height
    double flip, grayscale;                                 // probabilities
    double blur[2], blur_probability;                       // sigma, pixels
    double jitter[4], jitter_probability;                   // amounts of brightness, ..., hue
    double patch_jitter[4], patch_jitter_probability;       //
    double patch_kind, patch_area[2], patch_log_aspect[2];  // share of the view
    double alpha_sigma_y, alpha_sigma_x;                    // pixels
};
constexpr int range_columns = 29;
static_assert(sizeof(ViewRanges) == range_columns * sizeof(double), "one double per column");

// Places in the row's stream of uniform numbers; spd_fast/views.py has the same.
constexpr int crop_tries = 10, row_draws = 64;
enum Draw {
    crop_area_at = 0,
    crop_aspect_at = 10,
    crop_top_at = 20,
    crop_left_at = 30,
    flip_at = 40,
    gray_at,
    blur_at,
    blur_sigma_at,
    jitter_at,
    patch_jitter_at = 50,
    patch_area_at = 56,
    patch_aspect_at,
    patch_top_at,
    patch_left_at,
    target_top_at,
    target_left_at
};

static inline double between(const double* bounds, double u) {
    return bounds[0] + (bounds[1] - bounds[0]) * u;
}

static inline double whole_offset(double u, double room) { return std::floor(u * (room + 1)); }

// Height and width, in whole pixels, of a box of given area and aspect.
static inline void box_of(double area, double aspect, double* height, double* width) {
    *height = std::rint(std::sqrt(area / aspect));
    *width = std::rint(std::sqrt(area * aspect));
}

// torchvision's RandomResizedCrop rule: the first of 10 boxes that fits, else a centred one.
static inline void draw_crop(const ViewRanges& r, const double* u, double height, double width,
                             ViewParams& p) {
    for (int k = 0; k < crop_tries; ++k) {
        double h, w;
        const double area = between(r.area, u[crop_area_at + k]) * height * width;
        box_of(area, std::exp(between(r.log_aspect, u[crop_aspect_at + k])), &h, &w);
        if (!(h >= 1 && h <= height && w >= 1 && w <= width)) continue;
        p.crop_height = float(h);
        p.crop_width = float(w);
        p.crop_top = float(whole_offset(u[crop_top_at + k], height - h));
        p.crop_left = float(whole_offset(u[crop_left_at + k], width - w));
        return;
    }
    // Flatter or steeper than any allowed box: cut at the centre to the nearest aspect.
    const double aspect = width / height;
    const double h = aspect < r.aspect[0] ? std::rint(width / r.aspect[0]) : height;
    const double w = aspect > r.aspect[1] ? std::rint(height * r.aspect[1]) : width;
    p.crop_height = float(h);
    p.crop_width = float(w);
    p.crop_top = float(std::floor((height - h) / 2));
    p.crop_left = float(std::floor((width - w) / 2));
}

// Order, brightness, contrast, saturation and hue, which follow each other in the row.
static inline void draw_jitter(const double* amounts, double probability, const double* u,
                               float* order) {
    const bool on = u[0] < probability;
    order[0] = float(std::floor(u[1] * 24));
    for (int k = 0; k < 4; ++k) {
        const double off = k < 3 ? 1 : 0, bounds[2] = {off - amounts[k], off + amounts[k]};
        order[1 + k] = float(on ? between(bounds, u[2 + k]) : off);
    }
}

static inline void draw_patch(const ViewRanges& r, const double* u, double height, double width,
                              ViewParams& p) {
    double h, w;
    box_of(between(r.patch_area, u[patch_area_at]) * height * width,
           std::exp(between(r.patch_log_aspect, u[patch_aspect_at])), &h, &w);
    h = min2(max2(h, 1.0), height);
    w = min2(max2(w, 1.0), width);
    p.patch_height = float(h);
    p.patch_width = float(w);
    p.patch_top = float(whole_offset(u[patch_top_at], height - h));
    p.patch_left = float(whole_offset(u[patch_left_at], width - w));
    p.target_top = float(whole_offset(u[target_top_at], height - h));
    p.target_left = float(whole_offset(u[target_left_at], width - w));
    p.alpha_sigma_y = float(r.alpha_sigma_y);
    p.alpha_sigma_x = float(r.alpha_sigma_x);
}

// The rows of all views of one image of height x width pixels, whose views have view_height x
// view_width.
static inline void draw_views(const ViewRanges* ranges, int views, uint64_t seed, uint64_t epoch,
                              uint64_t index, double height, double width, double view_height,
                              double view_width, ViewParams* rows) {
    for (int v = 0; v < views; ++v) {
        double u[row_draws];
        const uint64_t counter[4] = {0, uint64_t(v), index, epoch};
        for (int block = 0; block < row_draws / 4; ++block)
            uniform_block(counter, block, seed, u + 4 * block);
        const ViewRanges& r = ranges[v];
        ViewParams p{};
        const bool from_image = r.source < 0;
        p.source = float(r.source);
        draw_crop(r, u, from_image ? height : view_height, from_image ? width : view_width, p);
        p.flip = u[flip_at] < r.flip;
        p.grayscale = u[gray_at] < r.grayscale;
        if (u[blur_at] < r.blur_probability)
            p.blur_sigma = float(between(r.blur, u[blur_sigma_at]));
        draw_jitter(r.jitter, r.jitter_probability, u + jitter_at, &p.jitter_order);
        draw_jitter(r.patch_jitter, r.patch_jitter_probability, u + patch_jitter_at,
                    &p.patch_jitter_order);
        p.patch_kind = float(r.patch_kind);
        if (r.patch_kind > 0) draw_patch(r, u, view_height, view_width, p);
        rows[v] = p;
    }
}

}  // namespace spd
