// Whether rows of the table of view parameters can be carried out. Not for the hot files: see
// common.h.
#pragma once

#include <cmath>
#include <vector>

#include "augment_views.h"

namespace spd {

static inline bool is_whole(float v) { return v == std::floor(v); }

static inline bool is_inside(float start, float length, float room) {
    return start >= 0 && length >= 1 && start + length <= room;
}

static inline bool is_valid(const ViewParams& p, float source_height, float source_width,
                            float height, float width) {
    const float* number = &p.source;
    for (int i = 0; i < view_columns; ++i)
        if (!std::isfinite(number[i])) return false;
    for (const float v :
         {p.source, p.crop_top, p.crop_left, p.crop_height, p.crop_width, p.flip, p.jitter_order,
          p.grayscale, p.patch_kind, p.patch_top, p.patch_left, p.patch_height, p.patch_width,
          p.target_top, p.target_left, p.patch_jitter_order})
        if (!is_whole(v)) return false;
    for (const float v : {p.jitter_order, p.patch_kind, p.patch_jitter_order, p.brightness,
                          p.contrast, p.blur_sigma, p.alpha_sigma_y, p.alpha_sigma_x})
        if (v < 0) return false;
    if (p.jitter_order > 23 || p.patch_jitter_order > 23 || p.patch_kind > cut_paste ||
        !is_inside(p.crop_top, p.crop_height, source_height) ||
        !is_inside(p.crop_left, p.crop_width, source_width))
        return false;
    return p.patch_kind == no_patch ||
           (p.alpha_sigma_y <= most_alpha_sigma && p.alpha_sigma_x <= most_alpha_sigma &&
            is_inside(p.patch_top, p.patch_height, height) &&
            is_inside(p.patch_left, p.patch_width, width) &&
            is_inside(p.target_top, p.patch_height, height) &&
            is_inside(p.target_left, p.patch_width, width));
}

// The rows of all views of one image: each valid, and no circle of views made from each other.
static inline bool rows_are_valid(const ViewParams* rows, int views, float image_height,
                                  float image_width, float height, float width) {
    for (int v = 0; v < views; ++v) {
        const float source = rows[v].source;
        if (!(is_whole(source) && source >= -1 && source < views)) return false;
        const bool from_image = source < 0;
        if (!is_valid(rows[v], from_image ? image_height : height, from_image ? image_width : width,
                      height, width))
            return false;
    }
    std::vector<bool> made(views);
    int left = views;
    for (bool progress = true; progress;) {
        progress = false;
        for (int v = 0; v < views; ++v) {
            const int source = int(rows[v].source);
            if (made[v] || (source >= 0 && !made[source])) continue;
            made[v] = progress = true;
            --left;
        }
    }
    return left == 0;
}

}  // namespace spd
