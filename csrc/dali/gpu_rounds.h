// How a GPU makes the views of a batch: which views together, and in what memory. What
// spd_fast/ops/view_rounds.py does for torch tensors.
#pragma once

#include <algorithm>
#include <vector>

#include "../augment_views.h"

namespace spd {

struct ViewGroup {
    std::vector<int> views;
    int room;  // pixels of the largest patch, rounded up; 0: there are none
};

// Views by how many others they are made from; `rows` are of all images (images, views). Patches of
// a view must not need more room in one image than the result says, so all images count.
inline std::vector<ViewGroup> groups_of(const std::vector<ViewParams>& rows, int views) {
    constexpr int least_room = 1024;
    std::vector<ViewGroup> groups;
    std::vector<int> most_area(views);
    for (size_t i = 0; i < rows.size(); ++i)
        if (rows[i].patch_kind > 0)
            most_area[i % views] =
                max2(most_area[i % views], int(rows[i].patch_height * rows[i].patch_width));
    for (int v = 0; v < views; ++v) {
        size_t depth = 0;
        for (int source = int(rows[v].source); source >= 0; source = int(rows[source].source))
            ++depth;
        if (groups.size() <= depth) groups.resize(depth + 1);
        groups[depth].views.push_back(v);
        int& room = groups[depth].room;
        if (most_area[v])
            for (room = max2(room, least_room); room < most_area[v];) room *= 2;
    }
    return groups;
}

// The last view that others are made from, or -1.
inline int last_source(const std::vector<ViewParams>& rows, int views) {
    int last = -1;
    for (int v = 0; v < views; ++v) last = max2(last, int(rows[v].source));
    return last;
}

struct GpuBatch {
    const uint8_t* pixels;  // on the GPU, as are `images` and `params`
    const int64_t* images;  // (images, 3): where an image begins in pixels, height, width
    const ViewParams* params;
    const std::vector<ViewParams>& rows;  // the same, here
    int n_images, views, height, width;
    GpuViews target;
    void* stream;
};

// Launches all rounds. `allocate(bytes)` gives memory on the GPU that stays until the stream has
// come to its end.
template <class Allocate>
void make_views_on_gpu(const GpuBatch& batch, const Allocate& allocate) {
    const int sources = last_source(batch.rows, batch.views) + 1;
    const int64_t pixels = int64_t(batch.height) * batch.width, view = 3 * pixels;
    // 8 bits are too few to make further views from: then the first views, up to the last that is a
    // source, are also stored in 16.
    const bool coarse =
        sources && (batch.target.dtype == DType::uint8 || batch.target.dtype == DType::bfloat16);
    GpuViews fine{nullptr, DType::float16, {}, {1, 1, 1}, {0, 0, 0}, coarse ? sources : 0};
    if (coarse) {
        fine.data = allocate(size_t(sources * batch.n_images * view) * sizeof(uint16_t));
        const int64_t stride[5] = {batch.n_images * view, view, pixels, batch.width, 1};
        std::copy(stride, stride + 5, fine.stride);
    }
    const auto groups = groups_of(batch.rows, batch.views);
    for (size_t depth = 0; depth < groups.size(); ++depth) {
        const auto& [views, room] = groups[depth];
        const int64_t jobs = int64_t(batch.n_images) * int64_t(views.size());
        GpuRoundArgs args{};
        std::copy(views.begin(), views.end(), args.view);
        args.views_made = int(views.size());
        args.pixels = batch.pixels;
        args.images = batch.images;
        args.params = batch.params;
        args.n_images = batch.n_images;
        args.views = batch.views;
        args.height = batch.height;
        args.width = batch.width;
        args.tiles = (batch.height + view_tile_y - 1) / view_tile_y;
        args.from_images = depth == 0;
        if (depth) args.source = coarse ? fine : batch.target;
        args.target = batch.target;
        args.fine = fine;
        args.packed = depth > 0 && batch.target.dtype != DType::float32;
        const size_t bytes = args.packed ? sizeof(uint32_t) : 3 * sizeof(uint16_t);
        args.scratch =
            allocate(size_t(jobs * batch.height * (batch.width + batch.width % 2)) * bytes);
        args.sums = static_cast<float*>(allocate(size_t(jobs) * args.tiles * sizeof(float)));
        args.boxes = static_cast<float*>(allocate(size_t(jobs) * 3 * room * sizeof(float)));
        args.room = room;
        args.paste_fine =
            coarse && std::any_of(views.begin(), views.end(), [&](int v) { return v < sources; });
        args.stream = batch.stream;
        augment_round_cuda(args);
    }
}

}  // namespace spd
