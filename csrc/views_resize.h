// Crop, antialiased bilinear resize and flip of one view, row by row. Flipping only reverses the
// table of the step along the row.
#pragma once

#include "augment_views.h"
#include "vectors.h"

namespace spd {
namespace {  // internal linkage: see common.h

// A view in the making is row-planar: channel c of row y begins at data + y * row + c * pitch. So a
// row's three channels lie together in cache, operations that treat channels alike run over
// 3 * pitch floats at once, and vertical taps are whole rows. Pads are zero up to contrast, for the
// mean; later they may hold anything.
struct Plane {
    float* data;
    int height, width, pitch;
    ptrdiff_t row;
    float* at(int y) const { return data + y * row; }
};

struct Box {
    int top, left, height, width;
};

// For every output coordinate the first source coordinate and `taps` weights, none of which reads
// outside the source.
struct Taps {
    int taps;
    int* first;
    float* weights;  // (out, taps)
};

// The weights of an output sum to `gain`. Outputs past the end, up to a whole row, weigh nothing.
Taps resize_taps(int in, int out, bool flip, float gain, Pieces& pieces) {
    const double scale = double(in) / out, support = max2(1.0, scale);
    Taps t{most_taps(in, out), reinterpret_cast<int*>(pieces.take(padded(out))), nullptr};
    t.weights = pieces.take(size_t(padded(out)) * t.taps);
    for (int i = 0; i < out; ++i) {
        const double centre = scale * (i + 0.5);
        const int first = first_tap(centre, support, in, t.taps);
        const int place = flip ? out - 1 - i : i;
        float* w = t.weights + size_t(place) * t.taps;
        const float offset = float(first + 0.5 - centre), slope = float(1 / support);
        float sum = 0;
        for (int k = 0; k < t.taps; ++k) {
            w[k] = triangle(k + offset, slope);
            sum += w[k];
        }
        const float normalise = gain / sum;
        for (int k = 0; k < t.taps; ++k) w[k] *= normalise;
        t.first[place] = first;
    }
    for (int place = out; place < padded(out); ++place) {
        t.first[place] = t.first[out - 1];
        for (int k = 0; k < t.taps; ++k) t.weights[size_t(place) * t.taps + k] = 0;
    }
    return t;
}

// ------------------------------------------------------------------------------ down the columns

// d[i] = sum over k of w[k] * rows[k][i], or added to d
template <int taps, bool add>
void weighted_rows(float* __restrict d, const float* const* rows, int n, const float* w) {
    int i = 0;
    for (; i + lanes <= n; i += lanes) {
        Floats sum = add ? load(d + i) : Floats{};
        for (int k = 0; k < taps; ++k) sum += load(rows[k] + i) * w[k];
        store(d + i, sum);
    }
    for (; i < n; ++i) {
        float sum = add ? d[i] : 0;
        for (int k = 0; k < taps; ++k) sum += rows[k][i] * w[k];
        d[i] = sum;
    }
}

void weighted_rows(float* d, const float* const* rows, int n, const float* w, int taps) {
    switch (taps) {
        case 1: return weighted_rows<1, false>(d, rows, n, w);
        case 2: return weighted_rows<2, false>(d, rows, n, w);
        case 3: return weighted_rows<3, false>(d, rows, n, w);
        case 4: return weighted_rows<4, false>(d, rows, n, w);
        case 5: return weighted_rows<5, false>(d, rows, n, w);
    }
    weighted_rows<6, false>(d, rows, n, w);
    int k = 6;
    for (; k + 2 <= taps; k += 2) weighted_rows<2, true>(d, rows + k, n, w + k);
    if (k < taps) weighted_rows<1, true>(d, rows + k, n, w + k);
}

// ------------------------------------------------------------------ along the row, pixel by pixel

// A vector holds one pixel of each of `pixel_rows` rows. What an output needs is then found without
// a lookup, however far it lies from what its neighbour needs, and one weight serves all of it.

// n pixels of rows s[0 .. pixel_rows - 1].
void read_pixels(Floats* d, const uint8_t* const* s, int n) {
    int x = 0;
    for (; x + 4 + FourPixels::read_past <= n; x += 4) {
        const FourPixels pixels(s, 3 * x);
        for (int j = 0; j < 4; ++j) d[x + j] = pixels.pixel(j);
    }
    for (; x < n; ++x) {
        Floats pixel{};
        for (int r = 0; r < pixel_rows; ++r)
            for (int c = 0; c < 3; ++c) pixel[4 * r + c] = s[r][3 * x + c];
        d[x] = pixel;
    }
}

// The same from the channels of one row, `pitch` apart.
void interleave_pixels(Floats* d, const float* planar, int pitch, int n) {
    static_assert(has_lookup || pixel_rows == 1, "where there are more, lookups take its place");
    for (int x = 0; x < n; ++x)
        d[x] = Floats{planar[x], planar[pitch + x], planar[2 * pitch + x], 0};
}

// Row r of the result is planar at d[r], its channels `pitch` apart.
template <int fixed_taps = 0>
void weighted_pixels(float* const* d, int pitch, const Floats* s, const Taps& t) {
    const int taps = fixed_taps ? fixed_taps : t.taps;
    const float* w = t.weights;
    for (int x = 0; x < pitch; x += 4, w += 4 * taps) {
        const Floats* pixel[4];
        for (int j = 0; j < 4; ++j) pixel[j] = s + t.first[x + j];
        Floats block[4] = {};
        for (int k = 0; k < taps; ++k)  // four sums at a time, to hide the latency of the add
            for (int j = 0; j < 4; ++j) block[j] += pixel[j][k] * w[j * taps + k];
        transpose_quarters(block);
        for (int r = 0; r < pixel_rows; ++r)
            for (int c = 0; c < 3; ++c) store_quarter(d[r] + c * pitch + x, block[c], r);
    }
}

void weighted_pixels_by_taps(float* const* d, int pitch, const Floats* s, const Taps& t) {
    switch (t.taps) {
        case 1: return weighted_pixels<1>(d, pitch, s, t);
        case 2: return weighted_pixels<2>(d, pitch, s, t);
        case 3: return weighted_pixels<3>(d, pitch, s, t);
        case 4: return weighted_pixels<4>(d, pitch, s, t);
        case 5: return weighted_pixels<5>(d, pitch, s, t);
        default: return weighted_pixels(d, pitch, s, t);
    }
}

// ---------------------------------------------------------------------- along the row, by lookups

// The taps of `lanes` outputs at a time: what lane j of block b needs lies at base[b] + index[b][j]
// and the places after it. A crop of a view is at most as large as the result, so the first taps of
// neighbours are at most one place apart, and the index fits a vector.
struct TapBlocks {
    int taps, blocks;
    int* base;
    Ints* index;
    Floats* weights;  // (blocks, taps)
};

TapBlocks block_taps(const Taps& t, int out, Pieces& pieces) {
    const int blocks = padded(out) / lanes;
    TapBlocks b{t.taps, blocks, reinterpret_cast<int*>(pieces.take(blocks)),
                reinterpret_cast<Ints*>(pieces.take(size_t(blocks) * lanes)),
                reinterpret_cast<Floats*>(pieces.take(size_t(blocks) * lanes * t.taps))};
    int* index = reinterpret_cast<int*>(b.index);
    float* weights = reinterpret_cast<float*>(b.weights);
    for (int i = 0; i < blocks; ++i) {
        const int* first = t.first + i * lanes;
        b.base[i] = min2(first[0], first[lanes - 1]);  // monotonic, either way
        for (int j = 0; j < lanes; ++j) {
            index[i * lanes + j] = first[j] - b.base[i];
            for (int k = 0; k < t.taps; ++k)
                weights[(i * t.taps + k) * lanes + j] =
                    t.weights[size_t(i * lanes + j) * t.taps + k];
        }
    }
    return b;
}

// By looking up a tap of `lanes` outputs in a register. Channels are `to` and `from` apart.
template <int taps>
void weighted_lookups(float* d, ptrdiff_t to, const float* s, ptrdiff_t from, const TapBlocks& t) {
    for (int b = 0; b < t.blocks; ++b) {
        const float* p = s + t.base[b];
        const Floats* w = t.weights + b * taps;
        for (int c = 0; c < 3; ++c) {
            Floats sum{};
            for (int k = 0; k < taps; ++k) sum += lookup(load(p + c * from + k), t.index[b]) * w[k];
            store(d + c * to + b * lanes, sum);
        }
    }
}

// ---------------------------------------------------------------------------------------- a view

// Where a view comes from: the decoded image if there is one, else another view.
struct Source {
    const uint8_t* image;  // interleaved RGB
    int image_width;
    Plane view;
};

int next_power_of_two(int n) { return n <= 1 ? 1 : 2 * next_power_of_two((n + 1) / 2); }

// An image's rows are resized along the row first, each once, and kept as long as a later row of
// the view may need them. A view's rows are planar already, and its crop has no more rows than the
// result: down first.
class Resize {
  public:
    Resize(const Source& source, const ViewParams& p, const Plane& to, Pieces& pieces)
        : source_(source),
          box_{int(p.crop_top), int(p.crop_left), int(p.crop_height), int(p.crop_width)},
          pitch_(to.pitch),
          down_(resize_taps(box_.height, to.height, false, 1, pieces)),
          along_(
              resize_taps(box_.width, to.width, p.flip != 0, source.image ? 1 / 255.f : 1, pieces)),
          rows_(reinterpret_cast<const float**>(pieces.take(2 * down_.taps))),
          ring_rows_(next_power_of_two(down_.taps + pixel_rows - 1)) {
        if (source.image || !has_lookup)
            pixels_ = reinterpret_cast<Floats*>(pieces.take(size_t(box_.width) * lanes));
        if (source.image) {
            ring_ = pieces.take(size_t(ring_rows_) * 3 * pitch_);
            return;
        }
        line_ = pieces.take(3 * size_t(pitch_) + lanes);
        if (has_lookup) blocks_ = block_taps(along_, to.width, pieces);
    }

    // Row y to `d`, whose channels are a pitch apart. Rows are made from the top down.
    void make_row(float* d, int y) {
        const float* w = down_.weights + size_t(y) * down_.taps;
        for (int k = 0; k < down_.taps; ++k)
            rows_[k] = source_.image ? image_row(down_.first[y] + k)
                                     : source_.view.at(box_.top + down_.first[y] + k) + box_.left;
        if (source_.image) return weighted_rows(d, rows_, 3 * pitch_, w, down_.taps);
        const float* line = rows_[0];
        if (down_.taps > 1) {
            weighted_rows(line_, rows_, 2 * pitch_ + box_.width, w, down_.taps);
            line = line_;
        }
        if (has_lookup)  // one tap where the size stays, else two
            return blocks_.taps == 1 ? weighted_lookups<1>(d, pitch_, line, pitch_, blocks_)
                                     : weighted_lookups<2>(d, pitch_, line, pitch_, blocks_);
        interleave_pixels(pixels_, line, pitch_, box_.width);
        weighted_pixels_by_taps(&d, pitch_, pixels_, along_);
    }

  private:
    // Row r of the box, as wide as the view.
    const float* image_row(int r) {
        for (; ready_ <= r; ready_ += pixel_rows) {
            const uint8_t* s[pixel_rows];
            float* d[pixel_rows];
            for (int i = 0; i < pixel_rows; ++i) {
                s[i] = image_bytes(ready_ + i);
                d[i] = ring_row(ready_ + i);
            }
            read_pixels(pixels_, s, box_.width);
            for (int i = 0; i < pixel_rows; ++i) prefetch_bytes(ready_ + pixel_rows + i);
            weighted_pixels_by_taps(d, pitch_, pixels_, along_);
        }
        return ring_row(r);
    }

    // The last row again, where a group of rows reaches past it.
    const uint8_t* image_bytes(int r) const {
        const ptrdiff_t y = box_.top + min2(r, box_.height - 1);
        return source_.image + 3 * (y * source_.image_width + box_.left);
    }

    // The image has rarely stayed in a near cache, and rows are too short for the processor to
    // notice in time that they follow each other.
    void prefetch_bytes(int r) const {
        const uint8_t* s = image_bytes(r);
        for (int i = 0; i < 3 * box_.width; i += 64) __builtin_prefetch(s + i);
    }

    float* ring_row(int r) const { return ring_ + (r & (ring_rows_ - 1)) * size_t(3 * pitch_); }

    Source source_;
    Box box_;
    int pitch_;
    Taps down_, along_;
    TapBlocks blocks_{};
    const float** rows_;
    int ring_rows_;
    Floats* pixels_ = nullptr;
    float *ring_ = nullptr, *line_ = nullptr;
    int ready_ = 0;  // rows of the box
};

size_t resize_scratch(const ViewParams& p, int height, int width) {
    const int h = int(p.crop_height), w = int(p.crop_width);
    const size_t taps_y = most_taps(h, height), taps_x = most_taps(w, width);
    const size_t tables = padded(height) * (taps_y + 1) + padded(width) * (taps_x + 1) + 2 * taps_y,
                 blocks = padded(width) * (taps_x + 2), pixels = size_t(w) * lanes;
    const size_t rows = next_power_of_two(int(taps_y) + pixel_rows - 1) * 3 * size_t(padded(width));
    return tables + blocks + pixels + rows + lanes + 11 * 16;
}

}  // namespace
}  // namespace spd
