// Crop, antialiased bilinear resize and flip of one view, row by row: first down the columns, then
// along the row. Flipping only reverses the table of the second step.
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

// The weights of an output sum to `gain`.
Taps resize_taps(int in, int out, bool flip, float gain, Pieces& pieces) {
    const double scale = double(in) / out, support = max2(1.0, scale);
    Taps t{most_taps(in, out), reinterpret_cast<int*>(pieces.take(out)), nullptr};
    t.weights = pieces.take(size_t(out) * t.taps);
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
    return t;
}

// ------------------------------------------------------------------------------ down the columns

// Interleaved bytes to planar floats 0..255.
void read_pixels(float* __restrict d, ptrdiff_t pitch, const uint8_t* s, int n) {
    int x = 0;
    for (; x + lanes + Pixels::read_past <= n; x += lanes) {
        const Pixels pixels(s + 3 * x);
        for (int c = 0; c < 3; ++c) store(d + c * pitch + x, pixels.channel(c));
    }
    for (; x < n; ++x)
        for (int c = 0; c < 3; ++c) d[c * pitch + x] = s[3 * x + c];
}

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

// --------------------------------------------------------------------------------- along the row

// The taps of `lanes` outputs at a time: what lane j of block b needs lies at base[b] + index[b][j]
// and the places after it.
struct TapBlocks {
    int taps, blocks, span;  // largest index + 1
    int* base;
    Ints* index;
    Floats* weights;  // (blocks, taps); zero in the pad
};

TapBlocks block_taps(const Taps& t, int out, Pieces& pieces) {
    const int blocks = padded(out) / lanes;
    TapBlocks b{t.taps,
                blocks,
                0,
                reinterpret_cast<int*>(pieces.take(blocks)),
                reinterpret_cast<Ints*>(pieces.take(size_t(blocks) * lanes)),
                reinterpret_cast<Floats*>(pieces.take(size_t(blocks) * lanes * t.taps))};
    int* index = reinterpret_cast<int*>(b.index);
    float* weights = reinterpret_cast<float*>(b.weights);
    for (int i = 0; i < blocks; ++i) {
        const int x0 = min2(i * lanes, out - 1), x1 = min2(i * lanes + lanes, out) - 1;
        b.base[i] = min2(t.first[x0], t.first[max2(x0, x1)]);  // monotonic, either way
        for (int j = 0; j < lanes; ++j) {
            const int x = min2(i * lanes + j, out - 1);
            const bool pad = i * lanes + j >= out;
            index[i * lanes + j] = t.first[x] - b.base[i];
            b.span = max2(b.span, index[i * lanes + j] + 1);
            for (int k = 0; k < t.taps; ++k)
                weights[(i * t.taps + k) * lanes + j] = pad ? 0 : t.weights[size_t(x) * t.taps + k];
        }
    }
    return b;
}

// How far apart the taps of `lanes` outputs lie: those of one tap, or of all, within a vector or
// two.
enum Reach { tap_in_one, all_in_two, tap_in_two };

// By looking up all taps of `lanes` outputs in registers. Channels are `to` and `from` apart.
template <Reach reach, int fixed_taps = 0>
void weighted_lookups(float* d, ptrdiff_t to, const float* s, ptrdiff_t from, const TapBlocks& t) {
    const int taps = fixed_taps ? fixed_taps : t.taps;
    for (int b = 0; b < t.blocks; ++b) {
        const float* p = s + t.base[b];
        const Ints index = t.index[b];
        const Floats* w = t.weights + b * taps;
        for (int c = 0; c < 3; ++c) {
            const float* table = p + c * from;
            const Floats low = load(table), high = load(table + lanes);
            Floats sum{};
            for (int k = 0; k < taps; ++k) {
                const Floats at = load(table + k);
                if (reach == tap_in_one) sum += lookup(at, index) * w[k];
                if (reach == all_in_two) sum += lookup2(low, high, index + k) * w[k];
                if (reach == tap_in_two) sum += lookup2(at, load(table + k + lanes), index) * w[k];
            }
            store(d + c * to + b * lanes, sum);
        }
    }
}

// Three channels at once, where there is no looking up or an output's neighbours lie too far apart.
// A pixel is a vector of four, the last unused.

void interleave_pixels(Pixel4* d, const float* planar, int pitch, int n) {
    for (int x = 0; x < n; x += 4) {
        Pixel4 block[4] = {};
        for (int c = 0; c < 3; ++c) memcpy(&block[c], planar + c * pitch + x, sizeof(Pixel4));
        transpose(block);
        for (int j = 0; j < 4; ++j) d[x + j] = block[j];
    }
}

template <int fixed_taps = 0>
void weighted_pixels(float* d, int pitch, const Pixel4* s, const Taps& t, int n) {
    const int taps = fixed_taps ? fixed_taps : t.taps;
    for (int x = 0; x < pitch; x += 4) {
        Pixel4 block[4] = {};
        for (int j = 0; j < 4 && x + j < n; ++j) {
            const Pixel4* pixel = s + t.first[x + j];
            const float* w = t.weights + size_t(x + j) * taps;
            for (int k = 0; k < taps; ++k) block[j] += pixel[k] * w[k];
        }
        transpose(block);
        for (int c = 0; c < 3; ++c) memcpy(d + c * pitch + x, &block[c], sizeof(Pixel4));
    }
}

// ---------------------------------------------------------------------------------------- a view

// Where a view's pixels come from: the decoded image if there is one, else another view.
struct Source {
    const uint8_t* image;  // interleaved RGB
    int image_width;
    Plane view;
};

int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

class Resize {
  public:
    Resize(const Source& source, const ViewParams& p, const Plane& to, Pieces& pieces)
        : source_(source),
          box_{int(p.crop_top), int(p.crop_left), int(p.crop_height), int(p.crop_width)},
          width_(to.width),
          pitch_(source.image ? padded(box_.width) + 2 * lanes : source.view.pitch),
          down_(resize_taps(box_.height, to.height, false, 1, pieces)),
          along_(
              resize_taps(box_.width, to.width, p.flip != 0, source.image ? 1 / 255.f : 1, pieces)),
          line_(pieces.take(line_floats())),
          pixels_(reinterpret_cast<Pixel4*>(pieces.take(4 * size_t(padded(box_.width))))),
          rows_(reinterpret_cast<const float**>(pieces.take(2 * down_.taps))),
          ring_rows_(power_of_two(down_.taps)),
          ring_(source.image ? pieces.take(ring_rows_ * line_floats()) : nullptr) {
        if (has_lookup) blocks_ = block_taps(along_, to.width, pieces);
        by_lookup_ = has_lookup && blocks_.span <= 2 * lanes;
    }

    // Row y to `d`, whose channels are `pitch` apart. Rows are made from the top down.
    void make_row(float* d, int pitch, int y) {
        for (int k = 0; k < down_.taps; ++k) rows_[k] = source_row(down_.first[y] + k);
        const float* line = rows_[0];
        if (down_.taps > 1) {
            weighted_rows(line_, rows_, 2 * pitch_ + box_.width,
                          down_.weights + size_t(y) * down_.taps, down_.taps);
            line = line_;
        }
        if (by_lookup_) return along_planar(d, pitch, line);
        interleave_pixels(pixels_, line, pitch_, box_.width);
        along_interleaved(d, pitch);
    }

  private:
    // Lookups read on past the end of a channel; it does not matter what. Past the last row of a
    // view lie the tables, which are taken from the same block of memory as the planes, and after
    // them.
    size_t line_floats() const { return 3 * size_t(pitch_) + 2 * lanes; }

    // Row r of the box, planar. An image's are converted when they are first needed and kept as
    // long as a later row may need them.
    const float* source_row(int r) {
        if (!source_.image) return source_.view.at(box_.top + r) + box_.left;
        for (; ready_ <= r; ++ready_) {
            const ptrdiff_t pixel =
                (box_.top + ready_) * ptrdiff_t(source_.image_width) + box_.left;
            read_pixels(place(ready_), pitch_, source_.image + 3 * pixel, box_.width);
        }
        return place(r);
    }

    float* place(int r) const { return ring_ + (r & (ring_rows_ - 1)) * line_floats(); }

    void along_planar(float* d, int pitch, const float* s) const {
        const ptrdiff_t from = pitch_;
        if (blocks_.span <= lanes) switch (blocks_.taps) {
                case 1: return weighted_lookups<tap_in_one, 1>(d, pitch, s, from, blocks_);
                case 2: return weighted_lookups<tap_in_one, 2>(d, pitch, s, from, blocks_);
                default: return weighted_lookups<tap_in_one>(d, pitch, s, from, blocks_);
            }
        if (blocks_.span + blocks_.taps - 1 > 2 * lanes)
            return weighted_lookups<tap_in_two>(d, pitch, s, from, blocks_);
        switch (blocks_.taps) {
            case 3: return weighted_lookups<all_in_two, 3>(d, pitch, s, from, blocks_);
            case 4: return weighted_lookups<all_in_two, 4>(d, pitch, s, from, blocks_);
            default: return weighted_lookups<all_in_two>(d, pitch, s, from, blocks_);
        }
    }

    void along_interleaved(float* d, int pitch) const {
        switch (along_.taps) {
            case 2: return weighted_pixels<2>(d, pitch, pixels_, along_, width_);
            case 3: return weighted_pixels<3>(d, pitch, pixels_, along_, width_);
            case 4: return weighted_pixels<4>(d, pitch, pixels_, along_, width_);
            default: return weighted_pixels(d, pitch, pixels_, along_, width_);
        }
    }

    Source source_;
    Box box_;
    int width_, pitch_;
    Taps down_, along_;
    TapBlocks blocks_{};
    bool by_lookup_;
    float* line_;
    Pixel4* pixels_;
    const float** rows_;
    int ring_rows_;
    float* ring_;
    int ready_ = 0;
};

size_t resize_scratch(const ViewParams& p, int height, int width) {
    const int h = int(p.crop_height), w = int(p.crop_width);
    const size_t taps_y = most_taps(h, height), taps_x = most_taps(w, width);
    const size_t tables = height * (taps_y + 1) + width * (taps_x + 1),
                 blocks = padded(width) * (taps_x + 2);
    const size_t line = 3 * size_t(padded(max2(w, width)) + 2 * lanes) + 2 * lanes;
    return tables + blocks + (power_of_two(int(taps_y)) + 1) * line + 4 * padded(w) + 2 * taps_y +
           11 * 16;
}

}  // namespace
}  // namespace spd
