// augment_views on the CPU: all views of one image, in float32, each in one or two passes over its
// rows while they are in cache.
//
// The first pass resizes a row and adjusts its colours up to contrast, which needs the mean of the
// whole view; the second does the rest, blurs and stores. A view that needs neither contrast nor
// blur is stored in the first.

#include "augment_views.h"

#include "views_blur.h"
#include "views_color.h"
#include "views_patch.h"
#include "views_resize.h"
#include "views_store.h"

namespace spd {
namespace SPD_ISA {
namespace {

// A plane of `height` rows, and room above it: see make_view.
Plane whole_plane(float* memory, int height, int width) {
    const int pitch = padded(width), row = 3 * pitch;
    return {memory + blur_radius(height) * size_t(row), height, width, pitch, row};
}

// A vector more, which a lookup in the last row may read past its end; what lies there does not
// matter.
size_t plane_floats(int height, int width) {
    return size_t(height + blur_radius(height)) * 3 * padded(width) + lanes;
}

bool is_source_of(const ViewParams* params, int views, int v) {
    for (int other = 0; other < views; ++other)
        if (int(params[other].source) == v) return true;
    return false;
}

struct Kept {
    Plane plane;
    bool is_source, done;
};

// Makes and stores view v, whose rows may be read afterwards if `keep`; returns where they are.
Plane make_view(int v, const ViewParams& p, const Source& source, const Plane& plane, bool keep,
                const Store& out, Pieces pieces) {
    const int height = plane.height, pitch = plane.pitch;
    Resize resize(source, p, plane, pieces);
    const Blur blur(p.blur_sigma, plane, pieces);
    Adjustments colors = adjustments_of(
        {int(p.jitter_order), p.brightness, p.contrast, p.saturation, p.hue}, p.grayscale != 0);
    const Adjustment* middle = colors.list + colors.before_contrast();
    const Adjustment* end = colors.list + colors.count;
    const bool has_contrast = colors.contrast_at >= 0, has_blur = blur.radius() > 0;

    const bool one_pass = !has_contrast && !has_blur;
    float* line = pieces.take(plane.row);
    double sum = 0;
    for (int y = 0; y < height; ++y) {
        float* row = one_pass && !keep ? line : plane.at(y);
        resize.make_row(row, y);
        adjust_row(row, pitch, colors.list, middle);
        if (has_contrast) sum += gray_sum(row, pitch);
        if (one_pass) out.row(v, y, row, pitch);
    }
    if (one_pass) return plane;
    if (has_contrast) set_contrast(colors, sum, double(height) * plane.width);

    if (!has_blur) {
        for (int y = 0; y < height; ++y) {
            adjust_row(plane.at(y), pitch, middle, end);
            out.row(v, y, plane.at(y), pitch);
        }
        return plane;
    }
    // Blurred rows that are kept are written `radius` rows above their sources, where no later row
    // reads any more.
    Plane blurred = plane;
    blurred.data -= blur.radius() * plane.row;
    float* lines = pieces.take(band * plane.row);
    int ready = 0;
    for (int y = 0; y < height; y += band) {
        const int rows = min2(band, height - y);
        for (; ready < min2(height, y + rows + blur.radius()); ++ready)
            adjust_row(plane.at(ready), pitch, middle, end);
        float* d = keep ? blurred.at(y) : lines;
        blur.make_rows(d, y, rows);
        for (int j = 0; j < rows; ++j) out.row(v, y + j, d + j * plane.row, pitch);
    }
    return blurred;
}

// Floats that the above take from `pieces`, at most.
size_t view_scratch(const ViewParams& p, int height, int width) {
    const size_t rows = (band + 1) * 3 * size_t(padded(width)) + 2 * 16;
    const size_t making = resize_scratch(p, height, width) + blur_scratch(height, width) + rows;
    return max2(making, patch_scratch(p, height, width));
}

}  // namespace

bool augment_image(const AugmentArgs& args, int64_t image) {
    static thread_local Scratch scratch;
    const int views = args.views, height = args.height, width = args.width;
    const ViewParams* params = args.params + image * views;
    const int64_t* at = args.layout + 4 * image;
    const uint8_t* pixels = args.buffers[at[0]] + at[1];

    size_t most = 0, planes = 1;
    for (int v = 0; v < views; ++v) {
        most = max2(most, view_scratch(params[v], height, width));
        planes += is_source_of(params, views, v);
    }
    const size_t plane_size = plane_floats(height, width), line = 3 * size_t(width);
    const size_t table = views * sizeof(Kept) / sizeof(float);
    Pieces pieces = scratch.reserve(planes * (plane_size + 16) + most + table + line + 4 * 16);
    if (!pieces.next) return false;
    const Store out(args, image, pieces);
    const Plane shared = whole_plane(pieces.take(plane_size), height, width);
    Kept* kept = reinterpret_cast<Kept*>(pieces.take(table));

    // A view that others are made from has a plane of its own; the rest share one.
    for (int v = 0; v < views; ++v) {
        const bool is_source = is_source_of(params, views, v);
        kept[v] = {is_source ? whole_plane(pieces.take(plane_size), height, width) : shared,
                   is_source, false};
    }

    // Every round makes the views whose source exists. The caller has made sure that they do not
    // form a circle.
    for (int left = views; left > 0;)
        for (int v = views; v-- > 0;) {  // backwards: what is made from view 0 follows it at once
            const ViewParams& p = params[v];
            const bool from_image = p.source < 0;
            if (kept[v].done || (!from_image && !kept[int(p.source)].done)) continue;
            const Source source{from_image ? pixels : nullptr, int(at[3]),
                                from_image ? shared : kept[int(p.source)].plane};
            const bool has_patch = int(p.patch_kind) != no_patch;
            const Plane view =
                make_view(v, p, source, kept[v].plane, kept[v].is_source || has_patch, out, pieces);
            if (has_patch) {
                const Box changed = paste_patch(view, p, pieces);
                for (int y = changed.top; y < changed.top + changed.height; ++y)
                    out.part_of_row(v, y, view.at(y), view.pitch, changed.left,
                                    changed.left + changed.width);
            }
            kept[v].plane = view;
            kept[v].done = true;
            --left;
        }
    if (out.streamed()) streams_are_done();
    return true;
}

}  // namespace SPD_ISA
}  // namespace spd
